"""Training from data alone, before any alignment: what tokenizers and generators have in common."""
