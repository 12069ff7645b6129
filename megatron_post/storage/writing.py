"""Writes files that a user has named."""

from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8. Raises `ValueError` for a pipe, since opening one would wait for a reader."""
    path = Path(path)
    if path.is_fifo():
        raise ValueError(f"{path} is a pipe, and there may be no process that reads from it; name a file")
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
