"""The rooms' table in CONTRIBUTING.md and their picture, made from the layering test's own table.

python -m tests.rooms    # after a change of ALLOWED in tests/unit/test_layering.py
"""

import re
import textwrap
from collections.abc import Mapping

from tests.documentation import ROOT

Rooms = Mapping[str, set[str]]
TABLE, PICTURE = ROOT / "CONTRIBUTING.md", ROOT / "docs/images/rooms.svg"
_ROW = re.compile(r"^\| `(\w+)(/|\.py)` \| (.*) \| ([^|]*) \|$", re.MULTILINE)
_WIDTH, _GAP, _HEIGHT = 880, 10, 58
_STYLE = """<style>
  .card{fill:#f7f9fa;stroke:#c9d3d8}.box{fill:#fff;stroke:#54707c}
  text{font:11px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#4a5b63}
  .name{font-size:14px;font-weight:600;fill:#1d2b31}
  @media (prefers-color-scheme: dark){.card{fill:#1c2327;stroke:#3c4a51}.box{fill:#263238;stroke:#90a9b4}
  text{fill:#a9b8bf}.name{fill:#e8eef1}}
</style>"""


def table(rooms: Rooms, text: str) -> str:
    """CONTRIBUTING.md with what each room may import. Raises `KeyError` for a room that is no more."""

    def row(found: re.Match[str]) -> str:
        imports = ", ".join(f"`{name}`" for name in sorted(rooms[found[1]])) or "nothing of the package"
        return f"| `{found[1]}{found[2]}` | {found[3]} | {imports} |"

    return _ROW.sub(row, text)


def knowledge(text: str) -> dict[str, str]:
    """What each room knows, from the table in CONTRIBUTING.md."""
    return {found[1]: found[3].replace("`", "") for found in _ROW.finditer(text)}


def floors(rooms: Rooms) -> list[list[str]]:
    """Rooms from the ground up: each imports from lower floors alone. Raises `ValueError` for a circle."""
    imports = {room: {name.split(".")[0] for name in names} - {room} for room, names in rooms.items()}
    found: list[list[str]] = []
    while imports:
        lower = {room for floor in found for room in floor}
        floor = sorted(room for room, names in imports.items() if names <= lower)
        if not floor:
            raise ValueError(f"these rooms import each other in a circle: {sorted(imports)}")
        found.append(floor)
        imports = {room: names for room, names in imports.items() if room not in floor}
    return found


def picture(rooms: Rooms, known: Mapping[str, str]) -> str:
    """The floors as an SVG."""
    stacked = floors({room: names for room, names in rooms.items() if room in known})[::-1]
    height = len(stacked) * (_HEIGHT + _GAP) + _GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        "<title>The rooms: each imports from those below it alone</title>",
        _STYLE,
        f'<rect class="card" x="1" y="1" width="{_WIDTH - 2}" height="{height - 2}" rx="10"/>',
    ]
    for level, floor in enumerate(stacked):
        width, top = (_WIDTH - _GAP) / len(floor) - _GAP, _GAP + level * (_HEIGHT + _GAP)
        for column, room in enumerate(floor):
            left = _GAP + column * (width + _GAP)
            middle = left + width / 2
            size = f'x="{left:.0f}" y="{top}" width="{width:.0f}" height="{_HEIGHT}"'
            lines += [f'<rect class="box" {size} rx="6"/>', _text(middle, top + 19, room, "name")]
            words = textwrap.wrap(
                known[room].split(";")[0], int(width / 6.2), max_lines=2, placeholder=" ..."
            )
            lines += [_text(middle, top + 35 + 14 * number, words) for number, words in enumerate(words)]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _text(x: float, y: int, words: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.0f}" y="{y}" text-anchor="middle">{words.replace("&", "&amp;")}</text>'


def main() -> None:
    """Write both."""
    from tests.unit.test_layering import ALLOWED

    text = table(ALLOWED, TABLE.read_text())
    TABLE.write_text(text)
    PICTURE.write_text(picture(ALLOWED, knowledge(text)))


if __name__ == "__main__":
    main()
