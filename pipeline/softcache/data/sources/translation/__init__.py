"""Sources of pairs of texts."""
