"""One record of bytes for each position: smaller, within a stated error."""
