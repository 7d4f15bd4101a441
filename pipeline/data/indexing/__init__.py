"""From a folder, tar shards or Parquet files to one index of all images.

`build.build_index` is the way in.
"""
