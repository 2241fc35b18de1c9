"""Model directories that are damaged, or mean harm."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .hostile import DICTIONARY, deep, mutated
from .world import Case, World

COUNT = 200
SLOW = 20.0
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
Damage = Callable[[Path, random.Random], Any]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ../outside/new",)


def anywhere(tree: Any, rng: random.Random, value: Any) -> Any:
    """The tree with one value somewhere in it replaced."""
    if isinstance(tree, dict) and tree and rng.random() < 0.8:
        key = rng.choice(list(tree))
        return {**tree, key: anywhere(tree[key], rng, value)}
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        at = rng.randrange(len(tree))
        return [*tree[:at], anywhere(tree[at], rng, value), *tree[at + 1 :]]
    return value


def a_value(path: Path, rng: random.Random) -> str:
    file = path / rng.choice(JSON)
    value = rng.choice([value for value in DICTIONARY if not isinstance(value, bytes)])
    tree = anywhere(json.loads(file.read_text()), rng, value)
    try:
        file.write_text(json.dumps(tree))
    except ValueError:  # an integer longer than Python writes
        file.write_text('{"vocab_size": ' + "9" * 5000 + "}")
    return f"{file.name} with {str(value)[:40]!r}"


def a_number(path: Path, rng: random.Random) -> str:
    file = path / "config.json"
    tree = json.loads(file.read_text())
    name = rng.choice([key for key, value in tree.items() if isinstance(value, int | float)])
    tree[name] = rng.choice((0, -1, 10**9, 2**63, 10**30, 1.5, -0.0, 1e308, None, True, "7", [1]))
    file.write_text(json.dumps(tree))
    return f"{name} = {tree[name]!r}"


def bytes_of(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    file.write_bytes(mutated(file.read_bytes(), rng))
    return f"damaged bytes in {file.name}"


def gone(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
    return f"no file {file.name}"


def weights(path: Path, rng: random.Random) -> str:
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    value = tensors[name].clone()
    how = rng.choice(("nan", "inf", "huge", "shape", "missing", "extra", "type", "empty", "zeros"))
    match how:
        case "nan" | "inf" | "huge":
            value.view(-1)[rng.randrange(value.numel())] = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38}[how]
            tensors[name] = value
        case "shape":
            tensors[name] = value.flatten()[:-1].clone()
        case "missing":
            del tensors[name]
        case "extra":
            tensors["x" * 300] = value
        case "type":
            tensors[name] = value.to(
                rng.choice((torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64))
            )
        case "empty":
            tensors[name] = value[:0].clone()
        case "zeros":
            tensors = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    return f"weights: {how} {name}"


def header(path: Path, rng: random.Random) -> str:
    file = path / "model.safetensors"
    heads = (
        *(struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10**9) + b"{" * 100, struct.pack("<Q", 100), b"", b"\0" * 8),
        struct.pack("<Q", len(deep(3000))) + deep(3000).encode(),
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[999999999999],"data_offsets":[0,4]}}'[:60],
    )
    at = rng.randrange(len(heads))
    file.write_bytes(heads[at])
    return f"safetensors header {at}"


def pickled(path: Path, rng: random.Random) -> str:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    return "a pickle that runs a command"


def code(path: Path, rng: random.Random) -> str:
    file = path / rng.choice(("config.json", "tokenizer_config.json"))
    tree = json.loads(file.read_text())
    (path / "evil.py").write_text("import os\nos.system('touch ../outside/new')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    tree["auto_map"] = {
        name: rng.choice(("evil.Evil", "../evil.Evil", "--evil", "owner/name--evil.Evil", 5)) for name in names
    }
    tree["model_type"] = rng.choice(("evil", "llama", "", None))
    file.write_text(json.dumps(tree))
    return f"code of its own in {file.name}"


def template(path: Path, rng: random.Random) -> str:
    texts = (
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ../outside/new') }}",
        "{{ raise_exception('\x1b[31mred\x1b]0;x\x07') }}",
        "{% if %}",
        "{% include '/etc/passwd' %}",
        "{{ messages[99].content }}",
        "{{ 1/0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "\x1b[2J{{ messages[0].content }}",
        "",
        "{{ messages | tojson }}" * 1000,
        "{{ namespace(x=1).x }}{% set ns = namespace(a=[]) %}{% for m in messages %}{% set ns.a = ns.a + [m] %}{% endfor %}",
    )
    text = rng.choice(texts)
    if rng.random() < 0.5:
        (path / "chat_template.jinja").write_text(text)
    else:
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": rng.choice((text, [text], {"a": 1}))}))
    return f"the chat template {text[:50]!r}"


def index(path: Path, rng: random.Random) -> str:
    (path / "model.safetensors").rename(path / "part.safetensors")
    names = ("../student/model.safetensors", "/etc/passwd", "part.safetensors", "gone.safetensors", "", 5, None, "/dev/zero")
    tree: Any = {"metadata": {}, "weight_map": {name: rng.choice(names) for name in load_file(path / "part.safetensors")}}
    tree = rng.choice((tree, tree, {"weight_map": {}}, {"weight_map": None}, [], {}))
    (path / "model.safetensors.index.json").write_text(json.dumps(tree))
    return "an index of shards that points elsewhere"


def link(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    file.unlink()
    file.symlink_to(rng.choice((file.name, "/dev/null", "/etc/passwd", "/nonexistent", "..", "../../outside/canary.txt")))
    return f"{file.name} a link to {os.readlink(file)}"


def extra(path: Path, rng: random.Random) -> str:
    name = rng.choice(
        (
            "adapter_config.json",
            "quantize_config.json",
            "preprocessor_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "npd.json",
            "vocab.json",
            "processor_config.json",
        )
    )
    (path / name).write_text(
        rng.choice(("{}", "[]", "", "{", '{"base_model_name_or_path": "../../x", "peft_type": "LORA"}', deep(2000)))
    )
    return f"a file {name}"


def quantised(path: Path, rng: random.Random) -> str:
    file = path / "config.json"
    method = rng.choice(("gptq", "bitsandbytes", "fp8", "x", None, 5, "awq", "mxfp4"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": method, "bits": 4}}))
    return f"quantised by {method!r}"


DAMAGES: tuple[Damage, ...] = (
    *(a_value, a_value, a_number, bytes_of, gone, weights, weights, header, pickled, code, template, index, link, extra),
    quantised,
)


def attack(case: Case, world: World) -> None:
    scene = world.scene(case)
    rng = scene.rng
    role = rng.choice(("student", "student", "teacher"))
    place = scene.path / "model"
    shutil.copytree(world.student if role == "student" else world.teacher, place)
    case.told = f"{role}: {DAMAGES[case.number % len(DAMAGES)](place, rng)}"
    sections: dict[str, Any] = {role: {"model": str(place)}, "training": {"max_steps": 3}}
    if "template" in case.told or rng.random() < 0.2:
        rows = [{"messages": [{"role": "user", "content": f"{n}+1="}]} for n in range(4)]
        sections["data"] = {"train": str(scene.write("chats.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))}
    command = rng.choice((("distill",), ("distill",), ("distill", "--dry-run"), ("data",), ("eval",)))
    if command == ("eval",):
        sections |= {"data": {"eval": str(world.data)}, "evaluation": {"tasks": ["answer"], "kl_prompts": 2}}
    case.told += f", {' '.join(command)}"
    name, *flags = command
    scene.npd(name, str(scene.write_config(world.tree(scene.run, sections))), *flags, slow=SLOW)
    scene.finish()
    scene.check_finished()
