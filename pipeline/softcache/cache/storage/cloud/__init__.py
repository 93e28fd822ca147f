"""Objects in a bucket, and the leases that say who writes."""
