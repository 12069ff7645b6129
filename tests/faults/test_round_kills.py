"""SIGKILL of a round and all its ranks at random moments. `make fault-test` prints the figures.

The round forks from a server that has imported everything, and the ranks of its steps fork from the round. So
a round takes seconds and spends few of them on imports, and most kills happen during work.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml
from rich.console import Console

import tests.ranks  # noqa: F401  what the server imports
from megatron_post.curation.run import curate
from megatron_post.rounds import round_actions
from megatron_post.rounds import run as module
from megatron_post.storage.files import read_lines
from tests.e2e.test_round import round_file
from tests.faults.conftest import FIGURES

KILLS = int(os.environ.get("ROUND_KILLS", 20 if os.environ.get("FAULT_TESTS") else 2))
# Files that depend on the course of a run and not only on its result.
_COURSE = re.compile(
    r"\.log$|/((metrics|starts)\.jsonl|tensorboard/.*|incarnations/.*|checkpoints/.*)$"
    r"|/(reward|sft|dpo)(/variant-\d+)?/report\.html$"
)
_context = multiprocessing.get_context("forkserver")


class RoundProcess:
    """`megatron-post round CONFIG` in its own process group. Output goes to `log`."""

    def __init__(self, config: Path, log: Path, *, dies_in_curation: bool = False) -> None:
        """dies_in_curation: it kills itself when `curate` begins to write the rows that it keeps."""
        log.write_text("")
        self.log, self.began = log, time.monotonic()
        self._process = _context.Process(target=_main, args=(str(config), str(log), dies_in_curation))
        self._process.start()

    def ends_within(self, seconds: float) -> bool:
        """Wait and return whether it has ended. Raises `AssertionError` if its exit status is not 0."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            return False
        assert self._process.exitcode == 0, self.log.read_text()[-5000:]
        return True

    def died_within(self, seconds: float) -> bool:
        """Wait and return whether SIGKILL has ended it."""
        self._process.join(seconds)
        return self._process.exitcode == -signal.SIGKILL

    def kill(self) -> None:
        """Kill the round and all processes that it has started at once."""
        assert self._process.pid is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet
            self._process.kill()
        self._process.join()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def step(self) -> str:
        """The last step that it has printed."""
        return (re.findall(r"^round-01/(\S+)$", self.log.read_text(), re.M) or ["start"])[-1]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """A round that is killed at random moments ends with the files of the undisturbed round, byte for byte.

    Each kill happens at a random moment within the duration of a whole round.
    """
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments drawn from seed {seed}")
    draw = random.Random(seed)
    config, run, log = round_file(tmp_path / "round"), tmp_path / "round" / "run", tmp_path / "log"
    whole = RoundProcess(config, log)
    assert whole.ends_within(1200)
    usual, expected = whole.seconds, _contents(run)
    _check_rows(run)
    places: Counter[str] = Counter()
    lost: list[float] = []
    rounds = 0
    while sum(places.values()) < KILLS:
        rounds += 1
        shutil.rmtree(run)
        while True:
            one = RoundProcess(config, log)
            left = KILLS - sum(places.values())
            ended = one.ends_within(draw.uniform(0, usual) if left else 1200)
            if ended:
                break
            places[one.step] += 1
            lost.append(min(one.seconds, _since(run / "state.json")))
            one.kill()
        found = _contents(run)
        assert sorted(found) == sorted(expected), seed
        assert [name for name in expected if found[name] != expected[name]] == [], seed
    FIGURES.append(
        f"SIGKILL of a round and its ranks: {KILLS} tried, {KILLS} resumed, in {rounds} rounds of "
        f"{usual:.0f} s; seconds since the last finished step, the most that a kill can lose: mean "
        f"{mean(lost):.1f}, most {max(lost):.1f}\n"
        f"  killed in: {', '.join(f'{step} {count}' for step, count in places.most_common())}"
    )


@pytest.mark.slow
def test_killed_while_its_rows_are_curated(tmp_path: Path) -> None:
    """SFT trains the rows that `curate` keeps, and a round that is killed there continues with them."""
    rules = [{"name": "odd", "pattern": "[13579]$", "max_share": 0.0, "roles": ["user"]}]
    (tmp_path / "curation.yaml").write_text(yaml.safe_dump({"steps": [{"kind": "clean", "rules": rules}]}))
    config = round_file(tmp_path / "round", curate=str(tmp_path / "curation.yaml"))
    first, log = tmp_path / "round" / "run" / "round-01", tmp_path / "log"
    killed = RoundProcess(config, log, dies_in_curation=True)
    assert killed.died_within(1200), log.read_text()[-5000:]
    assert killed.step == "curate" and not (first / "curation" / "rows.jsonl").exists()
    columns = {path: path.stat().st_mtime_ns for path in (first / "curation").rglob("*.parquet")}
    assert columns
    assert RoundProcess(config, log).ends_within(1200)
    assert {path: path.stat().st_mtime_ns for path in columns} == columns  # they were not made again
    selected = [row["messages"] for row in read_lines(first / "selection" / "sft.jsonl")]
    expected = [messages for messages in selected if not re.search("[13579]$", messages[0]["content"])]
    kept = list(read_lines(first / "curation" / "rows.jsonl"))
    assert [row["messages"] for row in kept] == expected and 0 < len(kept) < len(selected)
    stored = yaml.safe_load((first / "sft" / "config.yaml").read_text())["data"]["sources"]
    assert [source["path"] for source in stored] == [str(first / "curation" / "rows.jsonl")]
    assert (first / "curation" / "report.html").exists() and (first / "sft" / "hf").is_dir()
    assert "curate" in " ".join(json.loads((first.parent / "state.json").read_text())["done"])


def _since(file: Path) -> float:
    """Seconds since a file was written."""
    return time.time() - file.stat().st_mtime if file.exists() else float("inf")


def _contents(run: Path) -> dict[str, Any]:
    """The contents of all files that a round has made, and the names of its finished steps."""
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    state = json.loads(files.pop("state.json").read_text())
    found = {name: path.read_bytes() for name, path in files.items() if not _COURSE.search(name)}
    return found | {"done": list(state["done"])}


def _check_rows(run: Path) -> None:
    """Check that each prompt has its samples once, and that each sample has a score."""
    for responses, scores, prompts in (("samples", "scores", 6), ("held_out-samples", "held_out-scores", 12)):
        rows = list(read_lines(run / "round-01" / f"{responses}.jsonl"))
        assert [(r["prompt"], r["sample"]) for r in rows] == [
            (p + 1, k) for p in range(prompts) for k in range(4)
        ]
        answered = [i for i, row in enumerate(rows, start=1) if row["messages"][-1]["content"]]
        assert [row["row"] for row in read_lines(run / "round-01" / f"{scores}.jsonl")] == answered


def _main(config: str, log: str, dies_in_curation: bool) -> None:
    os.setpgid(0, 0)
    _print_to(Path(log))
    if dies_in_curation:
        round_actions.curate = partial(curate, begins=_die_at_the_selection)  # type: ignore[assignment]
    module.run_on_ranks = _on_forked_rank
    module.run_rounds(config, console=Console(force_terminal=False, width=300))


def _die_at_the_selection(name: str) -> None:
    if name == "selection":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def _on_forked_rank(command: Sequence[str], *, log: Path, **_: Any) -> None:
    """Like `run_on_ranks` for one rank, but without starting another interpreter."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, log.read_text()[-3000:]
        return
    from megatron_post import cli

    status: Any = 1
    try:
        _print_to(log)
        sys.argv = ["megatron-post", *command]
        cli.main()
        status = 0
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _print_to(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
