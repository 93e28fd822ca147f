"""The labels of a teacher into a cache: planned, labelled, written."""
