"""Scripts that run inside the sandbox, with Python's standard library alone. Nothing imports them."""
