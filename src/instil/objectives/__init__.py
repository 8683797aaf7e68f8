"""Packed batch and model to loss."""
