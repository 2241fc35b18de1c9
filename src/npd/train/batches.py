"""Micro-batches: what a forward pass is given, laid out in CPU memory and brought to the device while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from npd.packing import pack_tokens
from npd.train.samples import Samples

AHEAD = 2  # micro-batches laid out before their turn

Rows = tuple[list[list[int]], int]
"""Rows of sample indices, and the length that they are padded to."""


class MicroBatch(NamedTuple):
    inputs: tuple[Any, ...]
    """What `LossModel.forward` takes, in its order: tensors, and what stays in CPU memory."""
    by_student: Tensor
    """[B] indices into the labels of those that a snapshot of the student wrote."""
    behavior: Tensor
    """[B] float32, their log-probabilities by that snapshot."""

    @classmethod
    def of(cls, samples: Samples, rows: list[list[int]], length: int, pad_id: int) -> MicroBatch:
        """These samples, in CPU memory."""
        packed = pack_tokens(samples.prompts, samples.responses, rows, length, pad_id)  # type: ignore[arg-type]
        # Reference responses have no behaviour policy: no snapshot of the student wrote them.
        written = [len(samples.behavior[i]) > 0 for i in packed.samples]
        by_student = np.flatnonzero(np.repeat(written, samples.response_lengths[packed.samples]))
        return cls(
            (*packed[:4], *samples.topk(packed.samples), packed.cu_seq_lens, packed.lengths),
            torch.from_numpy(by_student),
            torch.from_numpy(samples.behavior.gather(packed.samples, np.float32)),
        )

    def pinned(self) -> MicroBatch:
        """In page-locked memory, from which a GPU copies while it computes."""
        return self._with(Tensor.pin_memory)

    def to(self, device: torch.device) -> MicroBatch:
        """On a device; nobody waits for the copies."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, moved: Callable[[Tensor], Tensor]) -> MicroBatch:
        inputs = tuple(moved(value) if isinstance(value, Tensor) else value for value in self.inputs)
        return MicroBatch(inputs, moved(self.by_student), moved(self.behavior))


def micro_batches(
    samples: Samples, turns: Iterable[Rows], pad_id: int, device: torch.device, *, threaded: bool | None = None
) -> Iterator[MicroBatch]:
    """The micro-batches on a device, in order.

    Args:
        threaded: a thread lays out the next ones meanwhile; None: for a GPU, as a CPU has nothing to do meanwhile.

    Raises:
        UserError: as `Samples.topk`.
    """
    gpu = device.type == "cuda"

    def lay_out(rows: list[list[int]], length: int) -> MicroBatch:
        batch = MicroBatch.of(samples, rows, length, pad_id)
        return batch.pinned() if gpu else batch

    if not (gpu if threaded is None else threaded):
        for turn in turns:
            yield lay_out(*turn).to(device)
        return
    waiting: list[Future[MicroBatch]] = []
    with ThreadPoolExecutor(1, "micro-batches") as thread:
        try:
            for turn in turns:
                waiting.append(thread.submit(lay_out, *turn))
                if len(waiting) > AHEAD:
                    yield waiting.pop(0).result().to(device)
            while waiting:
                yield waiting.pop(0).result().to(device)
        finally:
            for future in waiting:
                future.cancel()
