"""`data verify` reads a whole store and compares it with its checksums."""

from pathlib import Path

from rich.console import Console

from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_checksums import StoreError
from megatron_post.data.store_format import COLUMNS, GROUPS
from megatron_post.progress import WorkProgress

_NAMED = 10  # the number of damaged packs that the message lists, before it only counts the others


def check_store(path: str | Path, *, console: Console) -> None:
    """Print a line for each intact group. Raises `StoreError` that lists the damage and the remedy."""
    damaged = []
    for group in GROUPS:
        store = open_store(path, group)
        for name in COLUMNS:
            store.column(name)
        if store.has_reference:
            store.read_reference(store.reference_key)
        found = _damaged_packs(store, console)
        damaged += found
        if not found:
            reference = ", with reference log-probabilities" if store.has_reference else ""
            tokens = int(store.column("length").sum())
            console.print(
                f"{group}: {len(store):,} packs of {len(store.column('length')):,} segments and {tokens:,} "
                f"tokens are intact{reference}; digest {store.digest:.16}",
                highlight=False,
            )
    if damaged:
        more = f"\n  and {len(damaged) - _NAMED:,} more" if len(damaged) > _NAMED else ""
        raise StoreError(f"{len(damaged):,} damaged packs\n  " + "\n  ".join(damaged[:_NAMED]) + more)


def _damaged_packs(store: PackStore, console: Console) -> list[str]:
    found = []
    what = f"{store.group}: reading packs"
    with WorkProgress(what, total=len(store), unit="packs", console=console) as progress:
        for index in progress.track(range(len(store))):
            try:
                store.read(index)
            except StoreError as error:
                found.append(str(error))
    return found
