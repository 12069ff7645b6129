"""SIGKILL of a random rank at random moments. `make fault-test` prints the figures."""

import random
import signal
import time
from pathlib import Path
from statistics import mean, median

from megatron_post.storage import manifest
from tests.faults.conftest import FIGURES, Run, prepare
from tests.faults.incarnation import Incarnation

KILLS, EVERY, STEPS = 50, 2, 120


def test_fifty_kills(whole_set: None, tmp_path: Path) -> None:
    """Published checkpoints are intact after each kill, and the end equals the uninterrupted run's.

    Every third kill happens while a checkpoint is written, and every fifth at any moment from the start on.
    The other kills happen within two seconds of training.
    """
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments drawn from seed {seed}")
    draw = random.Random(seed)
    run = prepare(tmp_path, train={"steps": STEPS}, checkpoint={"every": EVERY})
    runs, lost, restarts, mid_save, early, before = 1, [], [], 0, 0, 0
    usual = 4.0  # seconds from the start to the first step, as last measured
    kills = 0
    while True:
        one = run.start()
        while_starting = bool(before) and kills % 5 == 4
        if before and not while_starting:
            one.until(lambda one=one: one.step or not one.alive)
            usual = time.monotonic() - one.began
            restarts.append(usual)
            lost.append(before - one.resumed)
            assert 0 <= lost[-1] <= 2 * EVERY, (seed, before, one.resumed)
        latest = usual if while_starting else usual + 2
        mid = kills % 3 == 0 and not while_starting
        if kills == KILLS or not _kill(one, run, draw, mid_save=mid, latest=latest):
            assert one.wait() == [0, 0], one.output
            run.check_end()
            if kills == KILLS:
                break
            runs, before = runs + 1, 0
            run = Run(run.config, tmp_path / f"run-{runs}", run.expected, run.losses)
            continue
        kills += 1
        mid_save += bool(list(run.root.glob(".partial-*")))
        early += not one.step
        before = max(one.step, before) if while_starting else one.step or before
        for step in run.published:
            manifest.verify_step(manifest.step_directory(run.root, step))
    FIGURES.append(
        f"SIGKILL of a random rank: {kills} tried, {kills} survived ({mid_save} with a checkpoint half "
        f"written, {early} before the first step), in {runs} runs of {STEPS} steps, saved every {EVERY}\n"
        f"  lost steps: mean {mean(lost):.1f}, most {max(lost)}; restart to the next step: median "
        f"{median(restarts):.1f} s, longest {max(restarts):.1f} s"
    )


def _kill(one: Incarnation, run: Run, draw: random.Random, *, mid_save: bool, latest: float) -> bool:
    """Kill one rank and then, like a launcher, the others. Returns False if the run ended before."""
    moment = one.began + draw.uniform(0, latest)
    began_at = one.step

    def due() -> bool:
        if not mid_save:
            return time.monotonic() > moment
        return one.step > began_at and bool(list(run.root.glob(".partial-*")))

    while one.alive and not due():
        time.sleep(0.001)
    if mid_save:
        time.sleep(draw.uniform(0, 0.02))
    if not all(rank.is_alive() for rank in one.ranks):
        return False
    victim = draw.randrange(len(one.ranks))
    one.signal(signal.SIGKILL, victim)
    time.sleep(draw.uniform(0, 0.3))  # the other ranks go on for a moment
    one.kill()
    return True
