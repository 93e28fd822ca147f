"""Pairs of texts: encoder-decoder models, label rows per token of the target."""
