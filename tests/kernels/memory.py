"""Tracks the memory that torch operations allocate on any device, by watching the dispatcher."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationTracker(TorchDispatchMode):
    """While entered: bytes of the storages that operations return, forward and backward.

    peak_bytes: most that lived at one time of what was allocated under the tracker.
    largest: most elements of one storage.
    What an operation allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.largest = 0
        # Memory is counted by storage. The weak reference also prevents reuse of the storage's address.
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, given=True)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, given=False)
        self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._known.values()))
        return result

    def _note(self, tensor: torch.Tensor, *, given: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            size = 0 if given else storage.nbytes()
            self._known[storage._cdata] = (StorageWeakRef(storage), size)
            self.largest = max(self.largest, size // tensor.element_size())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
