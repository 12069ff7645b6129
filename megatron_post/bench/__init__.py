"""`make bench`: packing, loading and training steps, measured beside TRL in one run."""
