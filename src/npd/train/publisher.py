"""Snapshots of the student, written beside the training."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import partial

import torch

from npd.config import Config
from npd.models import State, resolve_dtype
from npd.observe.events import Events, SpanName
from npd.placement import Placement
from npd.store import Store
from npd.train.trainer import Trainer


class Publisher:
    """Copies the student's weights and writes them in a thread, one snapshot at a time.

    Args:
        dtype: of the weights in a snapshot; None: as they are trained.
    """

    def __init__(self, store: Store, trainer: Trainer, events: Events, dtype: torch.dtype | None = None) -> None:
        self.store, self.trainer, self.events, self.dtype = store, trainer, events, dtype
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def publish(self, version: int, step: int) -> None:
        """Begin to write the weights as they are after a step; a snapshot that is there already is pointed to.

        Where the student is sharded every process has to call this, and the main one writes; else the main one alone.

        Raises:
            RunError: the snapshot before could not be written.
        """
        self.join()
        main = self.trainer.accelerator.is_main_process
        with self.events.span(SpanName.PUBLISH, version=version) if main else nullcontext():
            there = version in self.store.policies()
            state = None if there and not self.trainer.sharded else self.trainer.copy_policy(self.dtype)
            if there and main:
                self.store.point_to_newest_policy()  # if a crash came between
            if there or state is None:
                return
            self._thread = threading.Thread(target=self._write, args=(version, state, step), name="publisher")
            self._thread.start()

    def _write(self, version: int, state: State, step: int) -> None:
        try:
            with self.events.span(SpanName.WRITE, version=version):
                self.store.publish(version, partial(self.trainer.save_policy, state=state, dtype=self.dtype), step)
        except BaseException as error:
            self._failed = error

    def check(self) -> None:
        """Hear whether a snapshot that is no longer being written has failed; does not wait.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.join()

    def join(self) -> None:
        """Wait until the snapshot that is being written is whole.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is None:
            return
        with self.events.span(SpanName.PUBLISH) if self._thread.is_alive() else nullcontext():
            self._thread.join()
        self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Let what is being written end, where something else went wrong."""
        if self._thread is not None:
            self._thread.join()


def snapshot_dtype(config: Config, placed: Placement) -> torch.dtype | None:
    """The type that every engine of this machine rounds a snapshot's weights to; None where others may read it, or it is
    float32: then as they are trained."""
    if placed.producer is not None:
        return None
    devices = [worker.rollout for worker in placed.workers] or [placed.rollout]
    found = {resolve_dtype(config.student, trained=False, on=device) for device in devices}
    return found.pop() if len(found) == 1 and torch.float32 not in found else None
