"""Processes that train together, as a launcher starts them: gloo, on this machine's CPU.

They are forked from the tests, which have imported what they need.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from conftest import HANG

_context = multiprocessing.get_context("fork")


def together(world: int, function: Callable[..., Any], *args: Any, die: bool = False) -> list[Any]:
    """What a function of a module gives in each of so many processes; `die`: one kills itself, and all are ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    readers, processes = [], []
    for rank in range(world):
        reader, writer = _context.Pipe(duplex=False)
        process = _context.Process(target=_run, args=(rank, world, port, writer, function, args), daemon=True)
        process.start()
        writer.close()
        readers.append(reader)
        processes.append(process)
    found: list[Any] = []
    try:
        if die:
            multiprocessing.connection.wait([process.sentinel for process in processes], HANG)
            return []
        for reader in readers:
            assert reader.poll(HANG), "they hang"
            said, error = torch.load(io.BytesIO(reader.recv_bytes()), weights_only=False)
            assert error is None, error
            found.append(said)
        return found
    finally:
        for process in processes:
            if die or len(found) < world:
                process.kill()
            process.join()


def _run(rank: int, world: int, port: int, writer: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # the tests' own process trains alone
    try:
        _send(writer, function(*args), None)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        _send(writer, None, f"process {rank} of {world}: {traceback.format_exc()}")
    sys.stdout.flush()


def _send(writer: Any, said: Any, error: str | None) -> None:
    """As bytes: tensors that go by themselves lie with their process."""
    buffer = io.BytesIO()
    torch.save((said, error), buffer)
    writer.send_bytes(buffer.getvalue())
