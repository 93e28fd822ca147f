"""The columns of a cache as Zarr arrays or Parquet files."""
