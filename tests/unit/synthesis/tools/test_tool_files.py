"""Requests about uploaded files of each kind, which programs read in the sandbox."""

import base64
import json
from pathlib import Path

import pytest

from megatron_post.data.rows import BadRows
from megatron_post.synthesis.inputs import FilesInput, read_input
from tests.unit.synthesis.tools.author import Script, author
from tests.unit.synthesis.tools.conftest import ToolPlace

PLAIN = {
    "sales.csv": b"case,1\nmonth,sales\nmay,3\njune,4\n",
    "sales.tsv": b"case 2\nmay\t3\n",
    "notes.txt": "case 3: Zürich\n".encode(),
    "data.json": b'{"name": "case 4"}',
    "page.html": b"<html><style>p {}</style><p>case 5</p><script>x</script></html>",
    "double.py": b"# case 6\ndef double(x):\n    return x + x + 1\n",
}
PROGRAM = "print(len(open({name!r}, 'rb').read()))"


def _row(name: str, content: bytes) -> dict[str, str]:
    return {"file": name, "base64": base64.b64encode(content).decode()}


def test_programs_read_files(tool_place: ToolPlace) -> None:
    contents = {name: content.replace(b"case,1", b"case 1") for name, content in PLAIN.items()}
    scripts = {
        number: Script([("code_interpreter", PROGRAM.format(name=name))])
        for number, name in enumerate(contents, start=1)
    }
    rows = [_row(name, content) for name, content in contents.items()]
    tool_place.run("tool_files", author(scripts), rows=rows)
    assert tool_place.dropped() == {}
    for row, (name, content) in zip(tool_place.rows(), contents.items(), strict=True):
        assert row["messages"][0]["content"].startswith(f"[The file {name} is uploaded.]\n\nDo case")
        assert row["messages"][2]["content"] == f"completed\n[stdout]\n{len(content)}\n[/stdout]"
        assert (row["kind"], row["file"]) == (Path(name).suffix[1:], name)
    prompts = [body["messages"][0]["content"] for body in tool_place.requests if "tools" not in body]
    page = next(prompt for prompt in prompts if "page.html" in prompt and "uploaded" in prompt)
    assert "case 5" in page and "p {}" not in page
    code = next(prompt for prompt in prompts if "double.py" in prompt and "has uploaded" in prompt)
    assert any(task in code for task in ("bugs", "optimize", "explain", "test of"))


def test_files_and_programs_that_do_not_fit(tool_place: ToolPlace) -> None:
    scripts = {
        1: Script([("code_interpreter", "print(1)")]),
        2: Script([("code_interpreter", "print(open('b.txt').read())")], verdict="unsupported"),
    }
    rows = [
        _row("a.txt", b"case 1"),
        _row("b.txt", b"case 2"),
        _row("c.exe", b"case 3"),
        _row("d.txt", b"\xff\xfe\xfa"),
        _row("e.txt", b"  \n"),
        _row("read_file.py", b"case 6"),
        _row("../f.txt", b"case 7"),
        {"file": "g.txt", "text": "case 8"},
        _row("random.py", b"case 9"),
        _row("a\nb.txt", b"case 10"),
        _row("bad\udcff.txt", b"case 11"),
        _row("\u00e9" * 127 + ".txt", b"case 12"),
    ]
    tool_place.run("tool_files", author(scripts), rows=rows)
    found = tool_place.dropped()
    assert found.pop(7)[1].startswith("ValueError in the recipe: ValueError: file: '../f.txt'")
    assert "use `input.kind: files`" in found.pop(8)[1]
    name = "the name of the file is too long or has characters that cannot be printed"
    assert found == {
        **dict.fromkeys((10, 11, 12), ("(before the first step)", name)),
        1: ("solve", "no program names the file"),
        2: ("judge", "the judge does not find the answer in the outputs"),
        3: ("read", "files of this kind are not read"),
        4: ("read", "the file cannot be read"),
        5: ("read", "the file has no text"),
        6: ("(before the first step)", "the file has the name of a module that reads it"),
        9: ("(before the first step)", "the file has the name of a module that reads it"),
    }


def test_documents_of_offices(tool_place: ToolPlace) -> None:
    pypdf, docx = pytest.importorskip("pypdf"), pytest.importorskip("docx")
    openpyxl = pytest.importorskip("openpyxl")
    directory = tool_place.directory / "files"
    directory.mkdir()
    letter = docx.Document()
    letter.add_paragraph("case 1")
    letter.add_table(rows=1, cols=2).rows[0].cells[1].text = "in a table"
    letter.save(directory / "a.docx")
    book = openpyxl.Workbook()
    book.active.append(["case 2", 17])
    book.save(directory / "b.xlsx")
    _write_pdf(directory / "c.pdf", "case 3")
    assert "case 3" in pypdf.PdfReader(directory / "c.pdf").pages[0].extract_text()
    programs = [
        "import docx; print(docx.Document('a.docx').paragraphs[0].text)",
        "import openpyxl; print(openpyxl.load_workbook('b.xlsx').active['B1'].value)",
        "import pypdf; print(pypdf.PdfReader('c.pdf').pages[0].extract_text())",
    ]
    scripts = {number: Script([("code_interpreter", each)]) for number, each in enumerate(programs, start=1)}
    tool_place.run(
        "tool_files",
        author(scripts),
        packages=["pypdf", "docx", "lxml", "openpyxl", "et_xmlfile", "typing_extensions"],
        input={"kind": "files", "path": str(directory)},
    )
    outputs = [row["messages"][2]["content"].split("\n")[2] for row in tool_place.rows()]
    assert outputs == ["case 1", "17", "case 3"]
    prompts = [body["messages"][0]["content"] for body in tool_place.requests]
    assert any("in a table" in prompt for prompt in prompts)
    assert any("case 2\t17" in prompt for prompt in prompts)


def _write_pdf(path: Path, text: str) -> None:
    """A page with one line of text, by the specification."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, offsets = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    start = len(content)
    content += b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % each for each in offsets)
    content += b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % start
    path.write_bytes(content)


def test_the_input_of_files(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    (directory / "in").mkdir(parents=True)
    (directory / "in/a.bin").write_bytes(b"\x00\xff")
    (directory / "b.txt").write_bytes(b"x" * 2048)
    (directory / ".hidden").write_bytes(b"x")
    (tmp_path / "private").write_text("secret")
    (directory / "c").symlink_to(tmp_path / "private")
    bad_rows = BadRows(2)
    settings = FilesInput(kind="files", path=str(directory), largest_kib=1)
    rows = list(read_input(settings, bad_rows=bad_rows))
    assert [row.values for row in rows] == [
        {"file": "a.bin", "base64": base64.b64encode(b"\x00\xff").decode()}
    ]
    assert ["huge" in example or "link" in example for example in bad_rows.examples] == [True, True]
    assert json.dumps(rows[0].values)
