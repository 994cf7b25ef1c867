"""haloseg: seamless U-Net segmentation of scans larger than memory."""
