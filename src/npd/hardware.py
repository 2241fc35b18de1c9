"""Devices that a run may be planned for: one table of what their makers say, and this machine as it measures.

Figures are peaks. What npd reaches of them is in `EFFICIENCY`, each share with where it comes from.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from npd.errors import UserError, foreign

GIB = 1 << 30
MIB = 1 << 20
MOST = 100_000  # devices of one run on paper
THIS = "this"
NAMED = re.compile(r"\s*(?:(\d{1,7})\s*[x×*]\s*)?(.+?)\s*", re.IGNORECASE)
NEAR = 0.1  # how far what is called so many gigabytes may be from what its driver reports


@dataclass(frozen=True)
class Hardware:
    """One device."""

    name: str
    flops: float
    """Floating-point operations a second of matrix products: dense bfloat16; of a CPU float32."""
    bandwidth: float
    """Bytes a second between the device and its memory."""
    memory: float
    """Bytes that its driver reports."""
    link: float
    """Bytes a second to a neighbour in its machine, in each direction."""
    source: str
    kind: str = "accelerator"
    """Or cpu: then all of its cores are the device."""

    @property
    def half(self) -> bool:
        """Is bfloat16 its fast arithmetic?"""
        return self.kind != "cpu"


NVIDIA = "NVIDIA's data sheet,"
DRIVER = "memory by nvidia-smi"
DEVICES = (
    Hardware(
        "H200", 989e12, 4.8e12, 143_771 * MIB, 450e9, f"{NVIDIA} H200 SXM: 1,979 TFLOP/s with sparsity, 4.8 TB/s; {DRIVER}"
    ),
    Hardware(
        "H100", 989e12, 3.35e12, 81_559 * MIB, 450e9, f"{NVIDIA} H100 SXM: 1,979 TFLOP/s with sparsity, 3.35 TB/s; {DRIVER}"
    ),
    Hardware(
        "A100-80GB", 312e12, 2.039e12, 81_920 * MIB, 300e9, f"{NVIDIA} A100 80GB SXM: 312 TFLOP/s, 2,039 GB/s; {DRIVER}"
    ),
    Hardware(
        "A100-40GB", 312e12, 1.555e12, 40_960 * MIB, 300e9, f"{NVIDIA} A100 40GB SXM: 312 TFLOP/s, 1,555 GB/s; {DRIVER}"
    ),
    Hardware("L40S", 362e12, 864e9, 46_068 * MIB, 32e9, f"{NVIDIA} L40S: 362.05 TFLOP/s dense, 864 GB/s, PCIe 4; {DRIVER}"),
    Hardware(
        "4090",
        165.2e12,
        1.008e12,
        24_564 * MIB,
        32e9,
        f"NVIDIA Ada architecture white paper, RTX 4090: 165.2 TFLOP/s dense with float32 sums, 1,008 GB/s, PCIe 4; {DRIVER}",
    ),
    Hardware(
        "Ascend 910B",
        313e12,
        1.6e12,
        65_536 * MIB,
        196e9,
        "no public data sheet: reports of 910B1 to B4 go from 256 to 400 TFLOP/s in float16; taken are those of 910B3 in an "
        "Atlas 800T A2, 313 TFLOP/s and 64 GB. arXiv:2506.12708 has 1.6 TB/s for each die of the 910C, its successor",
    ),
)


class Share(NamedTuple):
    """What is reached of a peak."""

    accelerator: float
    cpu: float
    source: str


EFFICIENCY = {
    "training": Share(
        0.26, 0.60, "measured: 24% and 28% of an H200's peak (0.5B; 1.5B with checkpointing), 47% and 69% of a CPU's"
    ),
    "scoring": Share(0.26, 0.60, "assumed to be training's on accelerators; measured on a CPU: 49% and 69%"),
    "decoding": Share(0.26, 0.17, "assumed on accelerators, where bandwidth bounds it first; measured on a CPU: 14% and 19%"),
    "link": Share(0.70, 1.0, "assumed"),
}
"""Shares of the peak rate of products, of `link` of bytes: docs/benchmarks.md, "On a GPU" and "Each stage and its floor"."""


def efficiency(stage: str, device: Hardware) -> float:
    share = EFFICIENCY[stage]
    return share.cpu if device.kind == "cpu" else share.accelerator


def named_devices(text: str) -> tuple[Hardware, int]:
    """What `--on` means: H100, 8xH100, "16 x Ascend 910B", this.

    Raises:
        UserError: there is no such device in the table, or not so many of anything.
    """
    match = NAMED.fullmatch(text)
    count, name = (int(match[1] or 0), match[2]) if match else (0, text)
    if match and match[1] is not None and not 1 <= count <= MOST:
        raise UserError(f"--on asks for {count:,} devices; give 1 to {MOST:,}.")
    if name.lower() == THIS:
        here, there = this_device()
        return here, count or there
    found = called(name)
    if len(found) > 1:
        raise UserError(
            f"--on names {foreign(name, 60)!r}, which may be {' or '.join(d.name for d in found)}.",
            f"Say which, such as {count or 8}x{found[0].name}.",
        )
    if not found:
        raise UserError(
            f"--on names {foreign(name, 60)!r}, which is not in the table of devices ({', '.join(d.name for d in DEVICES)}).",
            "Name one of these, such as 8xH100, or `this` for the machine at hand; a device like it in memory and bandwidth "
            "gives the best guess.",
        )
    return found[0], count or 1


def names_others(text: str) -> bool:
    """Does `--on` mean other devices than this machine's?

    Raises:
        UserError: as `named_devices`.
    """
    match = NAMED.fullmatch(text)
    if match and match[2].lower() == THIS:
        return False
    named_devices(text)
    return True


def called(name: str) -> list[Hardware]:
    """Devices of the table that people and drivers call so: with or without their makers' words, and with as much memory as
    is named, if any is."""
    wanted, size = _plain(name)
    return [
        device
        for device in DEVICES
        if _plain(device.name)[0] == wanted and (size is None or abs(size * GIB / device.memory - 1) < NEAR)
    ]


def _plain(name: str) -> tuple[str, int | None]:
    """A name without makers' words and separators, and the gigabytes that it ends with."""
    plain = re.sub(r"[\s_-]|nvidia|geforce|rtx|huawei|ascend|sxm\d?|hbm\d?e?", "", name.lower())
    match = re.fullmatch(r"(.*[a-z]\d{1,3}[a-z]?|\d{4}|\d{3}[a-z])(\d{2,3})gi?b?", plain)
    return (match[1], int(match[2])) if match else (plain, None)


def this_device() -> tuple[Hardware, int]:
    """A device of this machine, and how many there are: its GPUs, or all of its cores as one.

    Peaks of a device that is not in the table are measured, in about a second.
    """
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        for device in called(there.name):
            if abs(there.total_memory / device.memory - 1) < NEAR:
                return replace(device, memory=float(there.total_memory)), count
        flops, bandwidth = _rates("cuda", torch.bfloat16, 8192, 1 << 28)
        return Hardware(there.name, flops, bandwidth, float(there.total_memory), 32e9, "measured here"), count
    flops, bandwidth = _rates("cpu", torch.float32, 1024, 1 << 25)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return Hardware(name, flops, bandwidth, memory, bandwidth, "measured here", kind="cpu"), 1


def _rates(on: str, dtype: torch.dtype, size: int, elements: int) -> tuple[float, float]:
    """Operations a second of products of two matrices, and bytes a second of copies."""
    a = torch.randn(size, size, device=on).to(dtype)
    long = torch.ones(elements, device=on)
    return 2 * size**3 / _least(lambda: a @ a, on), 8 * elements / _least(lambda: long.clone(), on)


def _least(act: Callable[[], object], on: str, seconds: float = 0.4) -> float:
    """The median second of calls that take so many seconds together, after one that warms up."""
    act()
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 3:
        if on == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        act()
        if on == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]
