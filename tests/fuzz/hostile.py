"""Values and bytes that nobody should write, and somebody will."""

from __future__ import annotations

import random
from typing import Any

LONG = "x" * 100_000
TEXTS: list[str] = [
    *(
        "",
        " ",
        "\0",
        "\n",
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\r",
        "\u202etfel",
        "\ud800",
        "é\u0301",
        "🧑‍🔬",
        "\ufeff",
    ),
    *("a/../../../outside", "../outside/new", "/", ".", "..", "~", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem"),
    *("/proc/self/environ", "/etc/passwd", "x" * 300, "a/" * 3000, LONG, "%s%n%d", "${HOME}", "$(touch outside/new)", "`id`"),
    *("{{ 7*7 }}", "{% for i in range(10**9) %}x{% endfor %}", "<script>x</script>", "null", "true", "1e400", "-0", "NaN"),
    *("http://[::1", "http://user:word@127.0.0.1:9", "file:///etc/passwd", "ftp://x", "http://\x1b[31m"),
    *("(", "[a-z", "(a+)+$", "*", "all-linear", "package:npd/..", "package:os/x", "package:", "hf://x", "s3://x/y", "con:"),
]
NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 2**31, 2**31 - 1, 2**63, -(2**63), 2**64, 10**12, 10**30, 10**400, 1e9, 1e12, 1e300, -1e300, 5e-324),
    *(1e-300, 0.5, 0.999999999, 1.0000001, -0.0, float("inf"), float("-inf"), float("nan"), True, False),
]
SHAPES: list[Any] = [
    *(
        None,
        [],
        {},
        [None],
        [[]],
        {"": ""},
        {"a": 1},
        [1, 2, 3],
        ["cpu", "cpu"],
        [{}],
        {"x": {"y": {"z": []}}},
        [[[[[[1]]]]]],
    ),
    *([""], ["\0"], [LONG[:5000]], {LONG[:5000]: 1}, {1: 2}, list(range(10_000)), "2026-01-01", b"\xff\xfe\x00"),
]
DICTIONARY: list[Any] = [*TEXTS, *NUMBERS, *SHAPES]


def deep(depth: int = 1000, opened: str = "[", closed: str = "]", core: str = "1") -> str:
    return opened * depth + core + closed * depth


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes, damaged in one to three of the ways in which files are."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 7, 64, 1000)))
        junk = rng.randbytes(rng.choice((1, 4, 40)))
        splices = (
            b"\0",
            b"\xff\xfe",
            b"\xed\xa0\x80",
            b"\x1b[2J",
            b"\n",
            b'"',
            b"{",
            b"\t",
            b"9" * 6000,
            b"[" * 3000,
            b"&a *a ",
        )
        data = rng.choice(
            (
                data[:at],  # cut short
                data[:at] + data[end:],
                data[:at] + junk + data[end:],
                data[:at] + rng.choice(splices) + data[at:],
                data[:at] + data[at:end] * 50 + data[end:],
                data[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at:end]) + data[end:],
                bytes(len(data)),  # as a file system leaves files that were not flushed
                b"",
            )[: rng.choice((6, 6, 6, 8))]
        )
    return data
