"""The scan, its truth and the model that ship with the project."""
