"""Where voxels are: boxes, blocks, tiles and mirrored reads, for any number of spatial axes."""
