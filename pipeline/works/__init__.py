"""The work on one block or column of blocks of a segmentation, wherever it runs."""
