"""Time and peak memory of one forward and backward pass of the loss, each in a process of its own, interleaved.

python -m benchmarks.loss --tokens 1024 --repeat 3

Contenders, all in float32 with the same result:
- npd: sparse_soft_cross_entropy;
- dense: log_softmax of all logits, one gather of label and top-k, autograd;
- compiled: the same in chunks under torch.compile and activation checkpointing, which computes each chunk's logits twice.
Liger's and cut-cross-entropy's kernels are Triton's: they need a GPU, and neither takes a top-k as its target.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.common import available_gib, fresh, interleaved, matmul_rate, peak, record, timed
from npd.losses import sparse_soft_cross_entropy

CONTENDERS = ("npd", "dense", "compiled")
KD_WEIGHT = 0.9
COMPILED_CHUNK = 128


def targets(labels_T: Tensor, ids_TK: Tensor, logprobs_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Label and top-k as one sparse target: ids [T, K+1], weights [T, K+1], and the part of the loss that is constant."""
    p_TK = logprobs_TK.exp()
    first = torch.full((len(labels_T), 1), 1 - KD_WEIGHT)
    ids, weights = torch.cat([labels_T[:, None], ids_TK], 1), torch.cat([first, KD_WEIGHT * p_TK], 1)
    return ids, weights, KD_WEIGHT * (p_TK * logprobs_TK).sum()


def npd(hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    return sparse_soft_cross_entropy(hidden, weight, labels, ids, logprobs, kd_weight=KD_WEIGHT).loss


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    all_ids, weights, constant = targets(labels, ids, logprobs)
    return constant - (weights * (hidden @ weight.T).log_softmax(-1).gather(1, all_ids)).sum()


def _chunk(hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return -(weights * (hidden @ weight.T).log_softmax(-1).gather(1, ids)).sum()


_compiled_chunk = torch.compile(_chunk, dynamic=False)


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    all_ids, weights, loss = targets(labels, ids, logprobs)
    for start in range(0, len(hidden), COMPILED_CHUNK):
        rows = slice(start, start + COMPILED_CHUNK)
        loss = loss + checkpoint(_compiled_chunk, hidden[rows], weight, all_ids[rows], weights[rows], use_reentrant=False)
    return loss


def one(options: argparse.Namespace) -> None:
    """Measure one contender; prints a JSON object."""
    work: Callable[..., Tensor] = {"npd": npd, "dense": dense, "compiled": compiled}[options.contender]
    torch.manual_seed(0)
    T, V, D, K = options.tokens, options.vocabulary, options.width, options.top_k
    hidden = torch.randn(T, D).requires_grad_()
    weight = torch.randn(V, D).mul_(D**-0.5).requires_grad_()
    labels = torch.randint(V, (T,))
    ids = torch.randint(V // K, (T, K)) + torch.arange(K) * (V // K)
    logprobs = torch.randn(T, K).log_softmax(-1) - 0.1
    rate = matmul_rate()
    few = slice(0, COMPILED_CHUNK)  # warms up, and compiles
    work(hidden[few], weight, labels[few], ids[few], logprobs[few]).backward()
    hidden.grad = weight.grad = None
    with peak() as figures:
        losses: list[Tensor] = []

        def step() -> None:
            losses.append(work(hidden, weight, labels, ids, logprobs))
            losses[0].backward()

        seconds = timed(step)
    assert weight.grad is not None
    assert hidden.grad is not None
    checks = {"loss": losses[0].item() / T, "norm": weight.grad.norm().item(), "norm_hidden": hidden.grad.norm().item()}
    floor = 6 * T * V * D / rate  # logits, gradient of hidden states, gradient of the head
    print(json.dumps({"seconds": seconds, "floor": floor, "share_of_floor": floor / seconds, **figures, **checks}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", "one"])
    parser.add_argument("--contender", choices=CONTENDERS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--name", default="loss", help="of the file in benchmarks/results")
    options = parser.parse_args()
    if options.what == "one":
        return one(options)
    sizes = {key: getattr(options, key) for key in ("tokens", "vocabulary", "width", "top_k")}
    runs = []
    for turn, contender in interleaved(CONTENDERS, options.repeat):
        needed = (3 * 4 * options.tokens * options.vocabulary) / 2**30 + 12 * options.vocabulary * options.width / 2**30
        if contender == "dense" and available_gib() < needed + 1:
            print(f"dense would need {needed:.0f} GiB, and {available_gib():.0f} are free: left out", flush=True)
            continue
        run = {"contender": contender, "turn": turn} | fresh("benchmarks.loss", contender=contender, **sizes)
        runs.append(run)
        print(run, flush=True)
        record(options.name, sizes | {"repeat": options.repeat}, runs)  # each time: a long run may be cut short


if __name__ == "__main__":
    main()
