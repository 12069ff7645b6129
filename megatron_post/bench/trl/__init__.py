"""Measures the trainer beside TRL's, with the same weights, tokens and optimizer settings."""
