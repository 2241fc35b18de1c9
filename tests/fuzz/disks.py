"""A disk of every size from nothing to enough, in steps of two pages; then it grows, and the run goes on.

Every third run is of a kind that makes generations beside the trainer. It takes a mount of its own, which not every machine
permits.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from .kills import BASES, undisturbed
from .world import Case, World, state_of

STEP = 8 << 10
COUNT = 120
NEWNS, NEWUSER, PRIVATE, REMOUNT, DETACH = 0x20000, 0x10000000, (1 << 14) | (1 << 18), 32, 2
libc = ctypes.CDLL(None, use_errno=True)


def mount(place: Path, size: int, flags: int = 0) -> None:
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, f"size={size},mode=700".encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def permitted() -> bool:
    """May this process, from now on in a mount namespace of its own, mount?"""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEWNS):
        if libc.unshare(NEWNS | NEWUSER):
            return False
        with suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return libc.mount(b"none", b"/", None, PRIVATE, None) == 0


def attack(case: Case, world: World) -> None:
    base = "beside" if case.number % 3 == 2 else "turns"
    facts = undisturbed(world, base)
    scene = world.scene(case)
    scene.run.mkdir()
    size = case.number * STEP
    case.told = f"{base}: a disk of {size >> 10} KiB"
    mount(scene.run, max(size, 4096))
    try:
        config = scene.write_config(world.tree(scene.run, BASES[base]))
        ended = scene.npd("distill", str(config))
        if ended.status and "full" not in ended.said and "No space left" not in ended.said:
            case.fault("does not say that the disk is full")
        mount(scene.run, 1 << 28, REMOUNT)
        again = scene.npd("distill", str(config), fine=[0])
        case.status = ended.status
        scene.finish()
        state = state_of(scene.run) if again.status == 0 else facts["state"]
        different = sorted(key for key in state.keys() | facts["state"].keys() if state.get(key) != facts["state"].get(key))
        if different:
            case.fault(f"differs from the undisturbed run: {different[:8]}")
    finally:
        libc.umount2(os.fsencode(scene.run), DETACH)
