"""One verb on finished caches per module."""
