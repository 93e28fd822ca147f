"""Sources of text: documents, tokenizers, samples of tokens."""
