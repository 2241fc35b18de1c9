"""Configurations that are none: half in a file, half by --section.key."""

from __future__ import annotations

import math
import random
from typing import Any

import yaml

from npd.config import Config, leaves

from .hostile import DICTIONARY, LONG, deep, mutated
from .world import PASSWORD, Case, World, altered

COUNT = 1000
KEYS = [tuple(key.split(".")) for key, _ in leaves(Config)]
FLOATS = {tuple(key.split(".")) for key, field in leaves(Config) if field.annotation in (float, float | None)}
# What a plan can be made of and would take a lifetime to do is not done here.
COMMANDS = (
    ("distill", "--dry-run"),
    ("distill", "--dry-run"),
    ("sft", "--dry-run"),
    ("data",),
    ("eval",),
    ("refresh", "--reselect"),
)
SLOW = 12.0  # seconds of processor time for a clear no, or a plan; one of them on an idle machine

DOCUMENTS: list[str | bytes] = [
    *(
        "",
        "\n",
        "---\n",
        "null",
        "[]",
        "42",
        "just words",
        "- a\n- b\n",
        "a: b: c",
        "\t- x",
        "key: [",
        "'",
        '"\\',
        "? ",
        "%YAML 9.9\n---\na: 1",
    ),
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "run_dir: &a [" + "x, " * 99 + "]\nplugins: [" + "*a, " * 9999 + "]\n",
    "a: &a\n  b: *a\n",
    "run_dir: &r [*r]\n",
    "&a run_dir: *a\n",
    "<<: {a: 1}\n",
    "<<: *nothing\n",
    "run_dir: !!python/object/apply:os.system ['touch outside/new']\n",
    "run_dir: !!python/name:os.system\n",
    "run_dir: !!binary aGVsbG8=\nstudent: !!set {a, b}\ndata: !!omap [a: 1]\n",
    "run_dir: 2026-01-01\nstudent: 12:30:45\ndata: 0o17\nseed: 1_000\n",
    "run_dir: 9999-99-99\n",
    "seed: " + "9" * 6000 + "\n",
    "seed: 0x" + "f" * 9000 + "\n",
    "seed: 1e999999999\n",
    "run_dir: x\nrun_dir: y\n",
    "1: 2\nnull: 3\ntrue: 4\n1.5: 5\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "a: 1\n---\nb: 2\n",
    deep(1000),
    deep(100_000),
    deep(2000, "{a: ", "}"),
    "- " * 5000 + "x",
    "a: |\n" + "  x\n" * 100_000,
    LONG,
    f"{LONG}: {LONG}",
    "run_dir: \ud800\n",
    "run_dir: \x1b[31m\n",
    'run_dir: "\\x1b[2J\\0\\ud800"\n',
    "provenance: null\n",
    "provenance: [1]\nstudent: null\ndata: null\n",
    b"\xff\xfea\x00:\x00 \x001\x00",
    b"\xef\xbb\xbfrun_dir: x\n",
    b"\x00" * 1000,
    b"\x80\x81\x82",
    b"run_dir: \xed\xa0\x80\n",
    *(
        f"plugins: [{name}]\n"
        for name in ("os", "no.such", "../x.py", "/etc/passwd", "/dev/null", "x.py", "'\\0'", "5", "null", "antigravity")
    ),
]


def restructured(tree: dict[Any, Any], rng: random.Random) -> Any:
    """The tree with sections dropped, swapped, emptied, or filled with what belongs elsewhere."""
    for _ in range(rng.randint(1, 3)):
        names = list(tree)
        if not names:
            return tree
        name, other = rng.choice(names), rng.choice(names)
        match rng.randrange(8):
            case 0:
                del tree[name]
            case 1:
                tree[name], tree[other] = tree[other], tree[name]
            case 2:
                tree[name] = rng.choice(DICTIONARY)
            case 3 if isinstance(tree[name], dict):
                tree[name] = {
                    **tree[name],
                    rng.choice(("x", "", 1, None, "\0", "lora", "model", LONG)): rng.choice(DICTIONARY),
                }
            case 4 if isinstance(tree[name], dict):
                tree[name] = list(tree[name].items())
            case 5:
                tree[rng.choice(("x", "", "sudent", "run_dir ", 7, None, True, "__class__"))] = rng.choice(DICTIONARY)
            case 6:
                tree[name] = {name: tree[name]}
            case _:
                tree[name] = [tree[name]]
    return tree


def attack(case: Case, world: World) -> None:
    scene = world.scene(case)
    rng = scene.rng
    base = world.tree(scene.run)
    if rng.random() < 0.3:
        base["data"]["eval"] = str(world.data)
        base["evaluation"] = {"tasks": ["answer"]}
    by_option = case.number % 2 == 1
    command = rng.choice(COMMANDS)
    options: list[str] = []
    must_refuse = False
    content: str | bytes = ""
    way = "value" if by_option else rng.choices(("value", "structure", "bytes", "document"), (6, 3, 3, 2))[0]
    if way == "value":
        key = KEYS[(case.number // 2) % len(KEYS)]
        value = rng.choice(DICTIONARY)
        if value == "http://user:word@127.0.0.1:9":
            value = f"http://user:{PASSWORD}@127.0.0.1:9" if key[-1] == "server" else value
        must_refuse = key in FLOATS and isinstance(value, float) and not math.isfinite(value)
        case.told = f"{'.'.join(key)} = {str(value)[:60]!r}"
        if by_option:
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).strip().removesuffix("...").strip()
            text = value if isinstance(value, str) and rng.random() < 0.5 else text
            options = [f"--{'.'.join(key)}={text}".replace("\0", "").encode("utf-8", "replace").decode()[:100_000]]
        else:
            base = altered(base, key, value)
        content = yaml.safe_dump(base, sort_keys=False, allow_unicode=rng.random() < 0.5)
    elif way == "structure":
        content = yaml.safe_dump(restructured(base, rng), sort_keys=False)
        case.told = "another structure"
    elif way == "bytes":
        content = mutated(yaml.safe_dump(base, sort_keys=False).encode(), rng)
        case.told = "damaged bytes"
    else:
        content = DOCUMENTS[(case.number // 2) % len(DOCUMENTS)]
        case.told = f"the document {content[:60]!r}"
    case.told += f", {' '.join(command)}"
    name, *flags = command
    config = scene.write("config.yaml", content)
    scene.npd(name, str(config), *options, *flags, fine=(2,) if must_refuse else (0, 1, 2), slow=SLOW)
    scene.finish()
