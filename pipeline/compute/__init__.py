"""How blocks run: one after another here, or on Dask workers."""
