"""What each divergence costs beside the forward KL, and how far a stored top-k is from the whole vocabulary.

    python -m benchmarks.divergences speed
    python -m benchmarks.divergences distance --run runs/demo/npd --name demo

*speed* times the loss and its gradients at SmolLM2's head. *distance* reads a run's responses with its teacher and with the
snapshot that wrote them, and computes, in float64, each divergence over the whole vocabulary, and on the teacher's top-k with
the rest as one symbol (tail) or nothing (raw): their means over response tokens, and how far the gradient with respect to the
logits is from the whole one's, as a share of that one's length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.common import RESULTS, interleaved, record, timed
from npd import models
from npd.config import ModelConfig, load_config
from npd.losses import sparse_soft_cross_entropy
from npd.registry import DIVERGENCES
from npd.store import Store

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl", "total_variation")


def divergence(name: str) -> Any:
    found: Any = DIVERGENCES[name]
    return found() if isinstance(found, type) else found


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    T, V, D, K = options.tokens, options.vocabulary, options.width, options.top_k
    hidden = torch.randn(T, D).requires_grad_()
    weight = torch.randn(V, D).mul_(D**-0.5).requires_grad_()
    labels, ids = torch.randint(V, (T,)), torch.randint(V // K, (T, K)) + torch.arange(K) * (V // K)
    logprobs = torch.randn(T, K).log_softmax(-1) - 0.1
    runs = []

    def step(name: str, mass: Any) -> None:
        hidden.grad = weight.grad = None
        sparse_soft_cross_entropy(
            hidden, weight, labels, ids, logprobs, kd_weight=0.9, top_k_mass=mass, divergence=divergence(name)
        ).loss.backward()

    ways = {f"{name} {mass}": (name, mass) for mass in ("raw", "tail") for name in KINDS}
    for name, mass in ways.values():
        step(name, mass)
    for turn, way in interleaved(list(ways), options.repeat):
        name, mass = ways[way]
        seconds = timed(lambda name=name, mass=mass: step(name, mass))  # type: ignore[misc]
        runs.append({"what": "speed", "divergence": name, "mass": mass, "turn": turn, "seconds": seconds})
    for mass in ("raw", "tail"):
        base = np.median([run["seconds"] for run in runs if (run["divergence"], run["mass"]) == (KINDS[0], mass)])
        for name in KINDS:
            mine = np.median([run["seconds"] for run in runs if (run["divergence"], run["mass"]) == (name, mass)])
            print(f"{name} {mass}: {mine:.3f} s, {mine / base:.2f} of the forward KL's", flush=True)
    return runs


def sheet(teacher: Tensor, student: Tensor, k: int, mass: str) -> tuple[Tensor, Tensor]:
    """[T, k+1] log-probabilities of the teacher's top-k and of the rest, as npd's loss has them."""
    top, ids = teacher.topk(k, -1)
    rest = torch.full_like(top[:, :1], -torch.inf)
    if mass == "tail" and k < teacher.shape[-1]:
        outside = torch.scatter(teacher, 1, ids, -torch.inf)
        rest = outside.logsumexp(-1, keepdim=True)
    said = student.gather(1, ids)
    lowest = torch.full_like(rest, torch.finfo(rest.dtype).min)
    others = torch.scatter(student, 1, ids, -torch.inf).logsumexp(-1, keepdim=True) if k < teacher.shape[-1] else lowest
    return torch.cat([top, rest], -1), torch.cat([said, others], -1)


def distance(options: argparse.Namespace) -> list[dict[str, Any]]:
    store = Store(options.run)
    config = load_config(options.run / "config.yaml")
    assert config.teacher is not None
    paths = [config.teacher.model, str(store.policy(options.generation))]
    pair = [models.load_model(ModelConfig(model=str(path))) for path in paths]
    sums: dict[tuple[str, str, int], list[tuple[float, float, float, float]]] = {}
    tokens, held = 0, dict.fromkeys(options.top_k_of, 0.0)
    part = pq.read_table(store.part(options.generation, 0), columns=["prompt_ids", "response_ids"])
    for row in part.slice(0, options.rows).to_pylist():
        given, wanted = row["prompt_ids"], row["response_ids"]
        ids = torch.tensor([given + wanted])
        with torch.no_grad():
            logits = [model(ids, use_cache=False).logits[0, len(given) - 1 : -1].double() for model in pair]
        size = min(each.shape[-1] for each in logits)
        teacher, z = logits[0][:, :size].log_softmax(-1), logits[1][:, :size].clone().requires_grad_()
        tokens += len(wanted)
        for k in options.top_k_of:
            held[k] += teacher.topk(k, -1).values.exp().sum().item()
        for name in KINDS:
            act = divergence(name)

            def value(k: int, mass: str, act: Any = act, teacher: Tensor = teacher, z: Tensor = z) -> tuple[float, Tensor]:
                found = act(*sheet(teacher, z.log_softmax(-1), k, mass)).sum()
                return found.item(), torch.autograd.grad(found, z)[0]

            whole, slope = value(size, "raw")
            for mass in ("tail", "raw"):
                for k in options.top_k_of:
                    mine, its = value(k, mass)
                    away = ((its - slope).norm(dim=-1) / slope.norm(dim=-1).clamp(min=1e-12)).sum().item()
                    cosine = torch.cosine_similarity(its, slope, -1).sum().item()
                    sums.setdefault((name, mass, k), []).append((whole, mine, away, cosine))
    runs: list[dict[str, Any]] = []
    print(f"{tokens} response tokens; mass in the top-k: { {k: round(v / tokens, 4) for k, v in held.items()} }")
    for (name, mass, k), found in sums.items():
        whole, mine, away, cosine = (float(sum(column)) / tokens for column in zip(*found, strict=True))
        run = {"what": options.name, "divergence": name, "mass": mass, "k": k, "tokens": tokens, "held": held[k] / tokens}
        runs.append(run | {"whole": whole, "top_k": mine, "gradient_away": away, "cosine": cosine})
        print(
            f"{name} {mass} k={k}: {mine:.4f} of {whole:.4f} nats, gradient {away:.3f} away, cosine {cosine:.4f}", flush=True
        )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "distance"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--run", type=Path, help="run directory")
    parser.add_argument("--generation", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--top-k-of", type=int, nargs="*", default=[10, 32, 64])
    parser.add_argument("--name", default="speed", help="of the pair of models")
    options = parser.parse_args()
    runs = speed(options) if options.what == "speed" else distance(options)
    file = RESULTS / "divergences.json"
    earlier = json.loads(file.read_text()) if file.exists() else {"runs": [], "options": {}}
    kept = [run for run in earlier["runs"] if run["what"] != options.name]
    record(
        "divergences",
        earlier["options"] | {options.name: {key: str(value) for key, value in vars(options).items() if key != "run"}},
        kept + runs,
    )


if __name__ == "__main__":
    main()
