"""Print the constraints of an image: what it keeps in the installed versions, and the rest of a file of pins.

python3 launchers/container/pins.py constraints.txt
"""

import re
import sys
from importlib import metadata
from pathlib import Path

# They are built for each other in NVIDIA's image.
KEPT = re.compile(
    r"torch|torchvision|triton|pytorch-triton|apex|transformer-engine.*|flash-attn.*|nvidia-.*|numpy"
)


def pins(text: str, installed: dict[str, str]) -> list[str]:
    """Lines of a constraint file. installed: versions by name."""
    kept = {_plain(name): version for name, version in installed.items() if KEPT.fullmatch(_plain(name))}
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return sorted(f"{name}=={version}" for name, version in kept.items()) + [
        line for line in lines if not KEPT.fullmatch(_plain(line.split("==")[0]))
    ]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    found = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    print("\n".join(pins(Path(sys.argv[1]).read_text(), found)))
