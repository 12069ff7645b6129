"""Ranks under torchrun, and another number of ranks after a stop."""

import signal
import subprocess
import time
from collections import Counter
from functools import partial
from itertools import islice

from megatron_post.config.load import load_config
from megatron_post.data.loader import PackLoader
from megatron_post.data.store import open_store
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.train.signals import REQUEUE
from tests.e2e.runs import kill_9
from tests.e2e.runs import start as start_under_torchrun
from tests.faults.conftest import FIGURES, Run
from tests.faults.injections import write_samples


def test_sigterm_to_torchrun(whole_set: None, run: Run) -> None:
    """torchrun passes the signal on and waits. The ranks save and exit with the status for a requeue."""
    run.directory.mkdir()
    log = run.directory / "torchrun"
    process = start_under_torchrun(
        ["train", str(run.config), f"run_dir={run.directory}", "train.steps=2000"], ranks=2, log=log
    )
    deadline = time.monotonic() + 120
    while "step    3/2000" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=60) != 0
    except subprocess.TimeoutExpired:
        kill_9(process)
        raise
    (saved,) = run.published[-1:]
    assert f"asked to stop (SIGTERM): saved after step {saved}" in log.read_text()
    FIGURES.append(f"SIGTERM to torchrun: saved after step {saved} and left")


def test_samples_are_the_same_multiset_on_other_numbers_of_ranks(whole_set: None, run: Run) -> None:
    """The run has two ranks, then one, then four. Together they take exactly the packs of one loader."""
    seen = run.directory / "seen"
    seen.mkdir(parents=True)
    steps = []
    for ranks in (2, 1, 4):
        one = run.start("train.steps=60", inject=partial(write_samples, seen), ranks=ranks)
        one.until(lambda one=one, steps=steps: one.step >= (steps or [0])[-1] + 3)
        one.signal(signal.SIGUSR1, 0)
        assert one.wait() == [REQUEUE] * ranks, one.output
        assert one.resumed == (steps or [0])[-1]
        steps.append(one.step)
    taken = Counter(unit for file in seen.iterdir() for unit in file.read_text().split())
    assert taken == _units(run, steps[-1])
    FIGURES.append(f"samples over 2, 1, 4 ranks: {taken.total()} units in {steps[-1]} steps, exactly those")


def _units(run: Run, steps: int) -> Counter[str]:
    config = load_config(run.config)
    fingerprint = load_tokenizer(config.tokenizer.path).fingerprint
    store = open_store(
        config.data.store,
        "train",
        pack_length=config.data.pack_length,
        segment_multiple=1,
        tokenizer_fingerprint=fingerprint,
        layout="dialogs",
    )
    batch = config.train.global_batch
    with PackLoader(store, seed=config.seed, global_batch=batch) as loader:
        packs = [pack for step in islice(loader, steps) for pack in step]
    return Counter(str(unit) for pack in packs for unit in pack.unit_ids.tolist() if unit >= 0)
