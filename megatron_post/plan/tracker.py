"""Records the memory and the collectives of torch operations, on any device and on fake tensors."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# c10d operation -> its name in reports
_COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
    "alltoall_base_": "all-to-all",
    "barrier": "barrier",
}


class Tracker(TorchDispatchMode):
    """While it is entered, records the storages that operations return and the collectives that they run.

    peak: the most bytes that were alive at one time. collectives: (name, ranks of the group) -> [calls,
    bytes]. The bytes of a call are those of its largest tensor. Memory that an operation allocates and frees
    itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.collectives: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self._known: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._live = 0

    @property
    def live(self) -> int:
        """Bytes that are alive now."""
        dead = [key for key, known in self._known.items() if known[0].expired()]
        for key in dead:
            self._live -= self._known.pop(key)[1]
        return self._live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._communicate(function, args)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, function)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tensor: torch.Tensor, function: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        # A new storage may have the address of one that was freed.
        if known is not None and known[0].expired():
            self._live -= self._known.pop(key)[1]
            known = None
        if known is None:
            name = f"{function.overloadpacket} {tuple(tensor.shape)} {tensor.dtype}"
            self._known[key] = (StorageWeakRef(storage), storage.nbytes(), name)
            self._live += storage.nbytes()

    def _communicate(self, function: Any, args: Any) -> None:
        name = _COLLECTIVES.get(function.overloadpacket.__name__)
        if name is None:
            return
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        size = max((x.numel() * x.element_size() for x in tensors), default=0)
        groups = [x for x in tree_leaves(args) if isinstance(x, torch.ScriptObject)]
        ranks = _ranks(groups)
        entry = self.collectives.setdefault((name, ranks), [0, 0])
        entry[0] += 1
        entry[1] += size


def _ranks(objects: list[Any]) -> tuple[int, ...]:
    for item in objects:
        try:
            group = torch.distributed.ProcessGroup.unbox(item)
        except (RuntimeError, TypeError):
            continue
        return tuple(torch.distributed.get_process_group_ranks(group))
    return ()
