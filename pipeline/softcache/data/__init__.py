"""What teacher and student see: sources, views of their samples, batches."""
