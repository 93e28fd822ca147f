"""Where the objects of a cache are: a folder, or a bucket."""
