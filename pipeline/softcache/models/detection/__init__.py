"""Detectors: built from a spec, split into their outputs, and scored."""
