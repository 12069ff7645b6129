"""What keeps a run safe, in one pair of hands: signals, pulse, roll call, skips and spikes."""

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_post.config.schema import Config
from megatron_post.data.pack import Pack
from megatron_post.display import say
from megatron_post.parallel.topology import Topology
from megatron_post.train.fence import Fence
from megatron_post.train.health import Spikes
from megatron_post.train.pulse import Pulse, Stragglers
from megatron_post.train.roll_call import Word, roll_call
from megatron_post.train.signals import StopRequest
from megatron_post.train.skips import Skips
from megatron_post.train.step_lines import StepLines


class Guard:
    """Of one run on one rank. sources: names of the store's sources, by which samples are told.

    `leaving` and `asked` say after a roll call whether any rank was asked to stop, and by which signal this
    one was.
    """

    def __init__(
        self, config: Config, topology: Topology, stop: StopRequest, sources: Sequence[str], fence: Fence
    ) -> None:
        train = config.train
        self._topology, self._stop, self.sources = topology, stop, list(sources)
        self.pulse = Pulse(topology.device)
        self.skips = Skips(config.run_dir, topology, policy=train.on_not_finite, most=train.max_skips)
        self._stragglers = Stragglers(topology.world_size)
        lines = StepLines(Path(config.run_dir) / "spikes.jsonl", may_write=lambda: fence.stands)
        self._spikes = Spikes(lines, topology, self.sources, threshold=train.spike)
        self._began, self.step, self.leaving = time.perf_counter(), 0, False

    @property
    def asked(self) -> str:
        return self._stop.received or "another rank was"

    def begin_run(self, *, after: int) -> None:
        """The run goes on after step `after`."""
        self._spikes.begin(after=after)

    def begin(self, step: int, section: str, *, patience: float = 1.0) -> None:
        """A step, an evaluation or a save begins, which may last `patience` times a step's deadline."""
        self._began, self.step = time.perf_counter(), step
        self.pulse.begin(step, section, patience=patience)

    def enter(self, section: str) -> None:
        """The next section of what has begun."""
        self.pulse.enter(section)

    def end(self) -> None:
        """Nothing has a deadline any more."""
        self.pulse.end()

    def elapsed(self) -> float:
        """Seconds since the step began, data included."""
        return time.perf_counter() - self._began

    def call_roll(self, *, bad_loss: bool, save_failed: bool) -> list[Word]:
        """All ranks' words; slow ranks are named on the console."""
        own = self.pulse.seconds()
        work = own.get("data", 0.0) + own.get("forward and backward", 0.0)
        asked = self._stop.received is not None
        words = roll_call(Word(bad_loss, asked, save_failed, work), self._topology)
        self.leaving = any(word.leaving for word in words)
        slow = self._stragglers.add([word.seconds for word in words])
        if slow and self._topology.is_reporter:
            say(f"step {self.step}: {slow}")
        return words

    def look_for_spikes(
        self, step: int, values: dict[str, float], packs: Sequence[Pack], losses: Sequence[float]
    ) -> dict[str, float]:
        """Outlier scores of a step, on the last pipeline stage; a spike is written down with its samples."""
        first = self._topology.tensor_rank == self._topology.context_rank == 0
        return self._spikes.look(step, values, packs, losses) if first else {}
