"""What others prove a writer of caches, or a storage backend, with."""
