"""What keeps a run safe: stop signals, the heartbeat, the exchange of rank statuses, skips and spikes."""

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_post.config.schema import Config
from megatron_post.data.pack import Pack
from megatron_post.display import say
from megatron_post.parallel.topology import Topology
from megatron_post.plan.flops import Load
from megatron_post.train.fence import Fence
from megatron_post.train.health import Spikes
from megatron_post.train.heartbeat import Heartbeat, Stragglers
from megatron_post.train.rank_status import RankStatus, gather_statuses
from megatron_post.train.signals import StopRequest
from megatron_post.train.skips import Skips
from megatron_post.train.step_lines import StepLines


class Guard:
    """The safety features of one run on one rank.

    sources: names of the store's sources, which messages use to identify samples. After `exchange_status`,
    `leaving` is True if any rank was asked to stop, `asked` names the signal that this rank received, and
    `load` is the work of all ranks' packs.
    """

    def __init__(
        self, config: Config, topology: Topology, stop: StopRequest, sources: Sequence[str], fence: Fence
    ) -> None:
        train = config.train
        self._topology, self._stop, self.sources = topology, stop, list(sources)
        self.heartbeat = Heartbeat(topology.device)
        self.skips = Skips(config.run_dir, topology, policy=train.on_not_finite, most=train.max_skips)
        self._stragglers = Stragglers(topology.world_size)
        lines = StepLines(Path(config.run_dir) / "spikes.jsonl", may_write=lambda: fence.is_current)
        self._spikes = Spikes(lines, topology, self.sources, threshold=train.spike)
        self._began, self.step, self.leaving = time.perf_counter(), 0, False
        self.load = Load(0, 0, 0)

    @property
    def asked(self) -> str:
        return self._stop.received or "another rank was"

    def begin_run(self, *, after: int) -> None:
        """Continue the run after step `after`."""
        self._spikes.begin(after=after)

    def begin(self, step: int, section: str, *, patience: float = 1.0) -> None:
        """Begin a step, an evaluation or a save. It may last `patience` times a step's deadline."""
        self._began, self.step = time.perf_counter(), step
        self.heartbeat.begin(step, section, patience=patience)

    def enter(self, section: str) -> None:
        """Begin the next section of the current step, evaluation or save."""
        self.heartbeat.enter(section)

    def end(self) -> None:
        """Stop watching deadlines until the next `begin`."""
        self.heartbeat.end()

    def elapsed(self) -> float:
        """Seconds since the step began, including the time to load its data."""
        return time.perf_counter() - self._began

    def exchange_status(self, *, bad_loss: bool, save_failed: bool, load: Load) -> list[RankStatus]:
        """Exchange this step's status with all ranks. Prints the ranks that are slow.

        load: the work of this rank's packs.
        """
        sections = self.heartbeat.seconds()
        # Reducing gradients is left out: a rank waits there for the slowest one, so the time says nothing.
        seconds = sections.get("data", 0.0) + sections.get("forward and backward", 0.0)
        asked = self._stop.received is not None
        own = RankStatus(bad_loss, asked, save_failed, seconds, load.tokens, load.squares, load.trained)
        statuses = gather_statuses(own, self._topology)
        self.leaving = any(status.leaving for status in statuses)
        replica = self._topology.world_size // self._topology.data_size
        self.load = Load(
            sum(status.tokens for status in statuses) / replica,
            sum(status.squares for status in statuses) / replica,
            sum(status.trained for status in statuses) / replica,
        )
        slow = self._stragglers.add([status.seconds for status in statuses])
        if slow and self._topology.is_reporter:
            say(f"step {self.step}: {slow}")
        return statuses

    def look_for_spikes(
        self, step: int, values: dict[str, float], packs: Sequence[Pack], losses: Sequence[float]
    ) -> dict[str, float]:
        """Outlier scores of a step, on the last pipeline stage. A spike is recorded with its samples."""
        first = self._topology.tensor_rank == self._topology.context_rank == 0
        return self._spikes.look(step, values, packs, losses) if first else {}
