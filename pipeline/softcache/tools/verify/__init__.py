"""Whether a cache is what was written, and what its teacher says."""
