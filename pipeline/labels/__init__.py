"""What is done with label arrays; numpy and scipy only."""
