"""Measures the project's figures: packing, loading, training steps, conversion, and steps beside TRL."""
