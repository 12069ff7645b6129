"""The notebook of the examples runs from the first cell to the last."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples/first_model.ipynb"


def test_the_notebook_runs_twice_in_one_directory(tmp_path: Path) -> None:
    """It has ten cells without outputs. A second run finds the finished model."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) == 10 and not any(cell.get("outputs") for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    once = "import json\nfor cell in json.loads(input()):\n    exec(cell, globals())\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", once],
        input=json.dumps([*code, *code]),
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("What is 0 plus 4? ->") == 2
    assert done.stdout.count("60 steps,") == 2 and "already finished: all 60 steps" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("loss "))
    before, after = line.removeprefix("loss ").split(",")[0].split(" -> ")
    assert float(after) < 0.5 * float(before)
