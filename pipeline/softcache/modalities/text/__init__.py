"""Texts: causal language models, label rows per token, loss of the evaluation split."""
