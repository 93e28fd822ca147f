"""The reading half: a cache opened, joined with its source, in an order, as batches."""
