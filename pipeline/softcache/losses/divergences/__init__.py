"""One file for each loss of a student's masses in the buckets of soft labels."""
