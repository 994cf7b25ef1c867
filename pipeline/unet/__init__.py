"""Networks, and how they are laid over blocks; the only place that imports torch."""
