"""Scripts that run in the sandbox. They import nothing of this package."""
