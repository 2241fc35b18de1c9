"""What a run need no longer keep."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from npd.store.files import remove_directory
from npd.store.names import GENERATION

if TYPE_CHECKING:
    from npd.store.store import Store


def tidy(store: Store, generation: int, keep: int) -> None:
    """Drop old snapshots and generations: see `Store.tidy`."""
    for version in [v for v in store.policies() if v <= generation][:-keep]:
        if version != 0:
            remove_directory(store.policy(version))
    there = []
    for old, _ in reversed([*GENERATION.within(store.path / "generations")]):
        if old > generation - keep:
            continue
        if store.manifest(old) is not None and not store.parts(old):
            break  # and so are all before it
        there.append(old)
    for old in reversed(there):  # oldest first, so that a crash leaves none behind that this would not look at
        manifest = store.manifest(old)
        if manifest is not None:
            store.finish_generation(replace(manifest, removed=True))
        for part in store.parts(old):
            store.part(old, part).unlink()
