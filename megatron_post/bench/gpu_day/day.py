"""Runs the pieces of `plan`, and keeps what they found in results.json and results.md.

Each piece stands alone. A check that has a result is not run again on the same machine and commit, so that
the same command again goes on. Without a GPU every piece starts: what a CPU can do runs, without figures, and
what it cannot do says why.
"""

import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_post.bench.gpu_day.install import engine_path
from megatron_post.bench.gpu_day.plan import PIECES, RESULT, Check

ROOT = Path(__file__).resolve().parents[3]
# of these statuses a check is run again
_OPEN = ("skipped", "not begun")


@dataclass(frozen=True)
class Outcome:
    """A check has passed or failed if an expectation was tested. It is measured if there was none.

    figures: of a GPU, by name with their unit. A run without one has none.
    """

    status: str
    found: str
    figures: dict[str, float]
    seconds: float


class Day:
    """Runs pieces, and keeps what they found."""

    def __init__(self, output: Path) -> None:
        self._output = output
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / "results.json"
        paths = [str(output / "site"), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "GPU_DAY_OUTPUT": str(output),
        }
        self.machine = self._machine()
        self.has_gpu = bool(self.machine["GPU"])
        self._results = self._earlier()
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, name: str, *, minutes: float) -> None:
        """Run what is open of a piece, for so long at most."""
        end = time.monotonic() + 60 * minutes
        checks = [check for check in PIECES[name] if self._status(check) in _OPEN]
        print(f"== {name}: {len(checks)} of {len(PIECES[name])} checks to run, {minutes:g} minutes at most")
        beside = {c.name: self._start(c) for c in checks if c.beside and not self._reason(c)}
        try:
            for check in [check for check in checks if check.name not in beside]:
                self._keep(name, check, self._outcome(check, end=end))
            for check in [check for check in checks if check.name in beside]:
                outcome = self._await(check, *beside[check.name], seconds=end - time.monotonic())
                self._keep(name, check, outcome)
        finally:
            for process in self._running:
                _end(process)

    def _status(self, check: Check) -> str:
        return str(self._results.get(check.name, {}).get("status", "not begun"))

    def _reason(self, check: Check) -> str:
        """Why a check cannot run on this machine; empty where it can."""
        if not self.has_gpu and check.without_gpu:
            return check.without_gpu
        if check.engine and engine_path(self._output) is None:
            return "Transformer Engine is not here"
        return ""

    def _outcome(self, check: Check, *, end: float) -> Outcome:
        reason = self._reason(check)
        if reason:
            return Outcome("skipped", reason, {}, 0.0)
        left = end - time.monotonic()
        if left < check.least:
            return Outcome("not begun", f"{max(left, 0):.0f} s of the piece were left", {}, 0.0)
        return self._await(check, *self._start(check), seconds=left)

    def _start(self, check: Check) -> tuple[subprocess.Popen[bytes], Path, float]:
        log = self._output / "logs" / f"{check.name.replace(' ', '-').replace('/', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        environment = dict(self._environment)
        engine = engine_path(self._output)
        if check.engine and engine is not None:
            environment["PYTHONPATH"] = f"{engine}{os.pathsep}{environment['PYTHONPATH']}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *check.command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(process)
        return process, log, time.monotonic()

    def _await(
        self, check: Check, process: subprocess.Popen[bytes], log: Path, began: float, *, seconds: float
    ) -> Outcome:
        try:
            process.wait(timeout=max(1.0, min(seconds, check.most)))
        except subprocess.TimeoutExpired:
            _end(process)
            spent = time.monotonic() - began
            # one that the end of the piece has cut off may have the next one's time
            status = "failed" if spent >= check.most - 1 else "not begun"
            return Outcome(status, f"cut off after {spent:.0f} s", {}, spent)
        spent = time.monotonic() - began
        return self._read(log.read_text(errors="replace"), failed=process.returncode != 0, seconds=spent)

    def _read(self, text: str, *, failed: bool, seconds: float) -> Outcome:
        """What a check's output says: its line of results, or the last line of a command that has none."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = (lines or ["(it printed nothing)"])[-1]
        results = [line for line in lines if line.startswith(RESULT)]
        if failed or not results:
            return Outcome("failed" if failed else "passed", last[:300], {}, seconds)
        content = json.loads(results[-1].removeprefix(RESULT))
        if content["ok"] is not None:
            status = "passed" if content["ok"] else "failed"
        else:
            status = "skipped" if not content["figures"] else "measured" if self.has_gpu else "ran"
        # a CPU's times say nothing about a GPU
        return Outcome(status, content["found"], content["figures"] if self.has_gpu else {}, seconds)

    def _keep(self, piece: str, check: Check, outcome: Outcome) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._results[check.name] = {"piece": piece, "expected": check.expected, "date": now} | vars(outcome)
        print(f"{outcome.status:<10} {check.name} ({outcome.seconds:.0f} s): {outcome.found}", flush=True)
        content = json.dumps({"machine": self.machine, "results": self._results}, indent=1)
        for path, text in ((self._path, content), (self._output / "results.md", self.table())):
            partial = path.with_suffix(".partial")
            partial.write_text(text + "\n")
            partial.replace(path)

    def table(self) -> str:
        """Every check of every piece with what was found, in Markdown."""
        where = self.machine["GPU"] or "no GPU: a dry run, which measures nothing"
        lines = [f"# {where}", "", ", ".join(f"{k} {v}" for k, v in self.machine.items() if k != "GPU" and v)]
        for name, checks in PIECES.items():
            lines += ["", f"## {name}", "", "| check | result | found | expected |", "|---|---|---|---|"]
            for check in checks:
                found = self._results.get(check.name, {"status": "not begun", "found": "", "figures": {}})
                figures = ", ".join(f"{key} {value:.4g}" for key, value in found["figures"].items())
                told = "; ".join(filter(None, (found["found"], figures)))
                cells = (check.name, found["status"], told, check.expected)
                lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        return "\n".join(lines)

    def failed(self) -> bool:
        """Whether any check has failed."""
        return any(result["status"] == "failed" for result in self._results.values())

    def _machine(self) -> dict[str, str]:
        """What the results hold for: other results are not gone on with."""
        probe = (
            "import torch; gpu = torch.cuda.is_available();"
            "print(torch.cuda.get_device_name() if gpu else '', torch.__version__, sep=chr(10))"
        )
        done = subprocess.run(
            [sys.executable, "-c", probe], env=self._environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            sys.exit(f"torch cannot be imported by {sys.executable}: {done.stderr.strip()[-300:]}")
        gpu, torch_version = done.stdout.splitlines()[-2:]
        return {
            "GPU": gpu,
            "torch": torch_version,
            "python": platform.python_version(),
            "commit": _commit(),
        }

    def _earlier(self) -> dict[str, Any]:
        """Results of the same machine and commit; those of another are kept under another name."""
        try:
            content = json.loads(self._path.read_text())
            if content["machine"] == self.machine:
                return dict(content["results"])
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            pass
        self._path.rename(self._output / f"results-{time.strftime('%Y%m%d-%H%M%S')}.json")
        return {}


def _end(process: subprocess.Popen[bytes]) -> None:
    """A check and the processes that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _commit() -> str:
    """Of this checkout, or what `prepare` has written into an archive of it."""
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        found = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        return found or (ROOT / "COMMIT").read_text().strip()
    return ""
