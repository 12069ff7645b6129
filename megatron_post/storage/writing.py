"""Files that a user asked for by name."""

from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8. Raises `ValueError` for a pipe: to open it would wait for a reader for ever."""
    path = Path(path)
    if path.is_fifo():
        raise ValueError(f"{path} is a pipe, and nothing may ever read from it; name a file")
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
