"""What `make gpu-day` does with its checks: here with commands of a line, and without a GPU."""

import ast
import json
import signal
import sys
from pathlib import Path

import pytest

from megatron_post.bench.gpu_day import check, day, install, prepare
from megatron_post.bench.gpu_day.day import Day
from megatron_post.bench.gpu_day.plan import PIECES, RESULT, SHARD_8B, SWITCHES, Check
from megatron_post.config.load import load_config
from tests.e2e.runs import ROOT


def _says(found: str, ok: bool | None, **figures: float) -> tuple[str, str]:
    content = json.dumps({"found": found, "ok": ok, "figures": figures})
    return "-c", f"print({RESULT + content!r})"


def _pieces(count: Path) -> dict[str, tuple[Check, ...]]:
    counting = f"open({str(count)!r}, 'a').write('x')"
    return {
        "one": (
            Check("beside", ("-c", "print('built')"), "built", beside=True),
            Check("good", _says("equal", True), "equality"),
            Check("bad", _says("2 apart", False), "equality"),
            Check("timed", _says("", None, step=0.5), "nothing"),
            Check("not run", _says("not run: no ncu", None), "nothing"),
            Check("command", ("-c", counting + "; print('first'); print('last | line')"), "status 0"),
            Check("broken", ("-c", "raise ValueError('why')"), "status 0"),
            Check("slow", ("-c", "import time; time.sleep(60)"), "soon", most=1.0),
            Check("of a GPU", _says("never", True), "a GPU", without_gpu="a reason"),
            Check("of an engine", _says("never", True), "an engine", engine=True),
        ),
        "two": (Check("late", _says("equal", True), "time", least=30.0),),
    }


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(day, "PIECES", _pieces(tmp_path / "count"))
    _on(monkeypatch, commit="one")
    return tmp_path / "out"


def _on(monkeypatch: pytest.MonkeyPatch, *, commit: str) -> None:
    """A machine without a GPU; torch is not asked."""
    machine = {"GPU": "", "torch": "2.13.0", "python": "3.12", "commit": commit}
    monkeypatch.setattr(Day, "_machine", lambda self: machine)


def test_statuses_and_table(pieces: Path) -> None:
    """Without a GPU nothing is measured: no figure is kept, and what took times says only that it ran."""
    found = Day(pieces)
    found.run("one", minutes=1)
    found.run("two", minutes=0.1)
    results = json.loads((pieces / "results.json").read_text())["results"]
    assert {name: (result["status"], result["found"]) for name, result in results.items()} == {
        "beside": ("passed", "built"),
        "good": ("passed", "equal"),
        "bad": ("failed", "2 apart"),
        "timed": ("ran", ""),
        "not run": ("skipped", "not run: no ncu"),
        "command": ("passed", "last | line"),
        "broken": ("failed", "ValueError: why"),
        "slow": ("failed", "cut off after 1 s"),
        "of a GPU": ("skipped", "a reason"),
        "of an engine": ("skipped", "Transformer Engine is not here"),
        "late": ("not begun", "6 s of the piece were left"),
    }
    assert all(result["figures"] == {} for result in results.values())
    table = (pieces / "results.md").read_text()
    assert table.startswith("# no GPU: a dry run, which measures nothing")
    assert "| command | passed | last / line | status 0 |" in table
    assert found.failed()


def test_figures_are_those_of_a_gpu(pieces: Path) -> None:
    found = Day(pieces)
    found.has_gpu = True
    found.run("one", minutes=1)
    result = json.loads((pieces / "results.json").read_text())["results"]["timed"]
    assert (result["status"], result["figures"]) == ("measured", {"step": 0.5})
    assert "| timed | measured | step 0.5 | nothing |" in (pieces / "results.md").read_text()


def test_the_same_command_goes_on(pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a result is not run again, what was skipped or had no time is. Another commit begins anew."""
    Day(pieces).run("one", minutes=1)
    Day(pieces).run("two", minutes=0.1)
    again = Day(pieces)
    again.run("one", minutes=1)
    again.run("two", minutes=1)
    assert (tmp_path / "count").read_text() == "x"
    results = json.loads((pieces / "results.json").read_text())["results"]
    assert results["late"]["status"] == "passed" and results["good"]["status"] == "passed"
    _on(monkeypatch, commit="another")
    Day(pieces).run("one", minutes=1)
    assert (tmp_path / "count").read_text() == "xx"
    assert len(list(pieces.glob("results-*.json"))) == 1


def test_no_check_outlives_the_command(pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping = ("-c", "import time; time.sleep(60)")
    checks = (Check("long", sleeping, "", beside=True), Check("good", _says("", True), ""))
    monkeypatch.setattr(day, "PIECES", {"one": checks})
    found = Day(pieces)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(found, "_keep", stop)
    with pytest.raises(KeyboardInterrupt):
        found.run("one", minutes=1)
    assert [process.poll() for process in found._running] == [-signal.SIGKILL, 0]


def test_what_is_carried_fits_and_becomes_whole(tmp_path: Path) -> None:
    """Carries of 100 bytes: small files whole, in order; a large one in parts, joined once all are there."""
    contents = {"a.whl": b"a" * 40, "b.whl": b"b" * 70, "c.whl": bytes(range(250)), "empty": b""}
    (tmp_path / "files").mkdir()
    for name, content in contents.items():
        (tmp_path / "files" / name).write_bytes(content)
    output = tmp_path / "out"
    carries = prepare.fill([tmp_path / "files" / name for name in contents], output, most=100)
    sizes = [sum(path.stat().st_size for path in carry.iterdir()) for carry in carries]
    assert sizes == [40, 100, 100, 100, 20]
    last = carries[3] / "c.whl.part-3-of-4"
    hidden = last.rename(tmp_path / "hidden")
    install._join_parts(output)
    assert not (output / "joined").exists()
    hidden.rename(last)
    install._join_parts(output)
    whole = [path for path in install._carried(output, "*") if ".part-" not in path.name]
    assert {path.name: path.read_bytes() for path in whole} == contents


def test_it_starts_where_nothing_is_installed() -> None:
    """What runs before the wheels are there imports the standard library alone."""
    folder = Path(day.__file__).parent
    for name in ("__init__", "__main__", "day", "plan", "install", "prepare"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in filter(None, names):
                own = module.rsplit(".", 1)[0] == "megatron_post.bench.gpu_day"
                assert own or module.split(".")[0] in sys.stdlib_module_names, f"{name}.py imports {module}"


def test_every_check_can_be_run() -> None:
    """Names are unique, and ours are functions of `check`; the pieces fit into 28 minutes."""
    checks = [item for piece in PIECES.values() for item in piece]
    assert len({item.name for item in checks}) == len(checks)
    names = {function.__name__ for function in check._CHECKS}
    ours = [item.command[2:] for item in checks if "megatron_post.bench.gpu_day.check" in item.command]
    assert {command[0] for command in ours} == names
    assert 9 * len(PIECES) < 28
    for command in ours:
        if command[0] == "step":
            load_config(str(ROOT / command[1]), command[2:])


@pytest.mark.parametrize("row", SWITCHES, ids=lambda row: row.setting)
def test_every_switch_is_a_setting(row: object) -> None:
    from megatron_post.bench.gpu_day.plan import Switch

    assert isinstance(row, Switch)
    without = load_config(str(ROOT / row.config), (*SHARD_8B, *row.base))
    assert load_config(str(ROOT / row.config), (*SHARD_8B, *row.base, row.setting)) != without


def test_fp8_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper may refuse mxfp8 in our words. Another failure, and another loss, are failures."""
    answers: dict[str, float | str] = {"delayed": 2.05, "tensorwise": 1.98, "blockwise": 2.0, "mxfp8": ""}
    answers["mxfp8"] = "a config error:\n- precision.fp8=mxfp8 needs compute capability 10.0"

    def once(stage: str, last: int, settings: tuple[str, ...]) -> list[tuple[float, float]]:
        recipe = settings[-1].removeprefix("precision.fp8=")
        answer = answers.get(recipe, 2.0)
        if isinstance(answer, str):
            raise ValueError(answer)
        return [(answer, 1.0)]

    monkeypatch.setattr(check, "once", once)
    assert not check.fp8().ok  # 2.05 is 2.5% off 2.0
    answers["delayed"] = 2.01
    found = check.fp8()
    assert found.ok and "mxfp8: precision.fp8=mxfp8 needs compute capability 10.0" in found.found
    answers["tensorwise"] = "CUDA error"
    assert not check.fp8().ok


@pytest.mark.slow
def test_checks_of_our_own_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save, a resume and a step of the real plan, in processes of their own."""
    chosen = {"asynchronous save", "kill and resume", "steps of the tiny model"}
    checks = tuple(item for piece in PIECES.values() for item in piece if item.name in chosen)
    monkeypatch.setattr(day, "PIECES", {"some": checks})
    monkeypatch.chdir(ROOT)
    found = Day(tmp_path)
    found.run("some", minutes=20)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    logs = "\n".join(path.read_text()[-2000:] for path in (tmp_path / "logs").iterdir())
    assert {result["status"] for result in results.values()} <= {"passed", "ran"}, logs
    assert set(results) == chosen
