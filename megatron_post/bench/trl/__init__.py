"""The trainer beside TRL's: the same weights, tokens and optimizer settings, in processes that take turns."""
