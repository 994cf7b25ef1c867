"""OME-Zarr on disk and on object stores; the only place that imports zarr."""
