"""The label policies, one in each file: its settings, and how it turns logits into soft labels."""
