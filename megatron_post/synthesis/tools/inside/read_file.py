"""Runs in the sandbox, and imports nothing of the package: the beginning of a file's text.

The arguments are the name of the file and a number of characters. The packages are only imported for the
kinds of files that need them.
"""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_PLAIN = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".py", ".xml", ".md")
UNKNOWN = 3  # exit status for a kind of file that cannot be read


class Unknown(Exception):
    """A kind of file that cannot be read."""


class _Html(HTMLParser):
    """The texts of a page, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden and data.strip():
            self.texts.append(data.strip())


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a file's text. Raises `Unknown`, and what a package raises."""
    match path.suffix.lower():
        case kind if kind in _PLAIN:
            yield from path.read_text(encoding="utf-8-sig").splitlines()
        case ".html" | ".htm":
            page = _Html()
            page.feed(path.read_text(encoding="utf-8-sig"))
            yield from page.texts
        case ".pdf":
            import pypdf

            for page_of_pdf in pypdf.PdfReader(path).pages:
                yield from page_of_pdf.extract_text().splitlines()
        case ".docx":
            import docx

            document = docx.Document(str(path))
            yield from (paragraph.text for paragraph in document.paragraphs)
            for table in document.tables:
                yield from ("\t".join(cell.text for cell in row.cells) for row in table.rows)
        case ".xlsx":
            import openpyxl

            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            for sheet in book.worksheets:
                yield f"Sheet {sheet.title}"
                for row in sheet.iter_rows(values_only=True):
                    yield "\t".join("" if value is None else str(value) for value in row)
        case kind:
            raise Unknown(kind)


def main() -> int:
    name, most = sys.argv[1], int(sys.argv[2])
    shown = 0
    try:
        for line in lines_of(Path(name)):
            print(line[: most - shown])
            shown += len(line) + 1
            if shown >= most:
                break
    except Unknown:
        return UNKNOWN
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.exit(main())
