"""Writes the files of files.json, which has their texts by path, and runs a command in their directory.

python3 in_repository.py WORD...
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    with open("files.json", encoding="utf-8") as file:
        texts: dict[str, str] = json.load(file)
    with tempfile.TemporaryDirectory() as directory:
        for name, text in texts.items():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return subprocess.run(sys.argv[1:], cwd=directory, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
