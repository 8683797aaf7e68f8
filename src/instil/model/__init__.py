"""Load and save models, adapters, attention over token trees, new tokens."""
