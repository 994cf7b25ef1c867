"""Training: patches, their changes, losses, the loop, and what it leaves behind."""
