"""What the instrument delivered: an xarray backend per format, lazily indexed, with physical coordinates."""
