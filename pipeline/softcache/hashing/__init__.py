"""Digests of contents, XXH3, Philox and SplitMix; what is compiled is in `batched`."""
