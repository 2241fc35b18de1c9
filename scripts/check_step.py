"""Check the training step on this machine's GPU: its products, its loss, what it waits for, what it holds, how fast it is.

    python scripts/check_step.py [--only NAME ...] [--out FILE.json]

Random models in the shapes of Qwen2.5; needs no network. Without a GPU it runs the same on tiny shapes, which tries the
script alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from npd import models
from npd.config import load_config
from npd.losses import sparse_soft_cross_entropy
from npd.losses.chunks import add_product, product
from npd.models import AfterHead
from npd.observe.display import Display
from npd.observe.events import Events
from npd.packing import pack
from npd.store import Store, write_json
from npd.train.memory import USABLE, StepMemory, step_memory
from npd.train.samples import Samples
from npd.train.trainer import Trainer, make_accelerator

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PEAK_FLOPS = 989e12  # bfloat16, dense, of an H100 or H200
GIB = 1 << 30
TOP_K = 10


@dataclass(frozen=True)
class Shape:
    """A model in the shape of Qwen2.5, and the samples that it is trained on."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 151_936
    row: int = 32_768
    longest: int = 4096


SMALL = Shape("0.5B", 24, 896, 4864, 14, 2)
LARGE = Shape("1.5B", 28, 1536, 8960, 12, 2)
TINY = Shape("tiny", 2, 32, 64, 4, 2, 1000, 512, 128)


@dataclass
class Result:
    check: str
    outcome: str = "works"
    seconds: float = 0.0
    words: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    mine, theirs = mine.detach().double().cpu(), theirs.detach().double().cpu()
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30))


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds_of(act: Callable[[], Any], repeat: int = 3) -> float:
    """The least of some calls, after one that warms up."""
    act()
    found = []
    for _ in range(repeat):
        synchronize()
        began = time.perf_counter()
        act()
        synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


# -- products and the loss


def products(result: Result) -> str:
    """Products of bfloat16 with a float32 result, also added to a total and of transposed factors, against float64."""
    g = torch.Generator(DEVICE).manual_seed(0)
    a, b = (torch.randn(512, 768, generator=g, device=DEVICE).bfloat16() for _ in range(2))
    wanted = a.double() @ b.double().T
    rounded = relative((a @ b.T).float(), wanted)
    found = {"product": relative(product(a, b.T, torch.float32), wanted)}
    total = torch.randn(768, 768, generator=g, device=DEVICE)
    wanted = total.double() + 2 * (a.double().T @ b.double())
    for _ in range(2):
        add_product(total, a.T, b)
    found["added"] = relative(total, wanted)
    result.figures = found | {"rounded": rounded}
    bound = 1e-5 if GPU else 1e-2
    assert max(found.values()) < bound, found
    return ", ".join(f"{name} {value:.1e}" for name, value in result.figures.items())


def loss_inputs(T: int, D: int, V: int, K: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(K)
    hidden, weight = torch.randn(T, D, generator=g) * 0.5, torch.randn(V, D, generator=g) * 0.1
    logprobs, ids = torch.log_softmax(2 * torch.randn(T, V, generator=g), -1).topk(K, dim=-1)
    labels = torch.randint(V, (T,), generator=g)
    labels[::2] = ids[::2, 0]
    return hidden, weight, labels, ids, logprobs


def loss_values(result: Result, *, compiled: bool = False) -> str:
    """Loss and gradients against float64 on the CPU: both types, k 10 and 64, raw and tail, a soft cap, in chunks."""
    worst: dict[str, float] = {}
    for K in (10, 64):
        inputs = loss_inputs(700, 64, 3000, K)
        for dtype in (torch.float32, torch.bfloat16):
            for mass in ("raw", "tail"):
                for after in (None, AfterHead(0.7, 3.0)):
                    hidden, weight = inputs[0].to(dtype), inputs[1].to(dtype)
                    options: dict[str, Any] = {"kd_weight": 0.9, "top_k_mass": mass, "after_head": after, "scale": 1 / 1021}
                    theirs = hidden.double().requires_grad_(), weight.double().requires_grad_()
                    labels, ids, logprobs = inputs[2:]
                    wanted = sparse_soft_cross_entropy(*theirs, labels, ids, logprobs.double(), **options, fused=False)
                    wanted.loss.backward()
                    mine = (
                        hidden.to(DEVICE, copy=True).requires_grad_(),
                        weight.float().to(DEVICE, copy=True).requires_grad_(),
                    )
                    there = [t.to(DEVICE) for t in inputs[2:]]
                    out = sparse_soft_cross_entropy(*mine, *there, **options, fused=True, compiled=compiled, chunk_tokens=300)
                    out.loss.backward()
                    name = str(dtype).removeprefix("torch.")
                    values = max(
                        relative(getattr(out, n), getattr(wanted, n)) for n in ("loss", "ce", "kd", "label_logprobs")
                    )
                    grads = max(relative(m.grad, t.grad) for m, t in zip(mine, theirs, strict=True))  # type: ignore[arg-type]
                    for key, value in ((f"{name} values", values), (f"{name} gradients", grads)):
                        worst[key] = max(worst.get(key, 0.0), value)
    result.figures = worst
    assert worst["float32 values"] < 1e-5, worst
    assert worst["float32 gradients"] < 1e-5, worst
    assert worst["bfloat16 values"] < (1e-4 if GPU else 1e-2), worst
    assert worst["bfloat16 gradients"] < 1e-2, worst
    return ", ".join(f"{name} {value:.1e}" for name, value in worst.items())


def loss_compiled(result: Result) -> str:
    """The same, with the sweeps compiled."""
    return loss_values(result, compiled=True)


def loss_speed(result: Result) -> str:
    """Seconds of the loss, forward and backward, in place, in two sweeps, and in compiled sweeps."""
    T, D, V = (8192, LARGE.hidden, LARGE.vocabulary) if GPU else (64, 16, 500)
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(T, D, generator=g, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(V, D, generator=g, device=DEVICE) * 0.05).requires_grad_()
    ids = torch.randint(V - TOP_K, (T, 1), generator=g, device=DEVICE) + torch.arange(TOP_K, device=DEVICE)
    logprobs = torch.full((T, TOP_K), -3.0, device=DEVICE)
    labels = ids[:, 0].contiguous()
    words = []
    for name, options in (
        ("in place", {"fused": False}),
        ("two sweeps", {"fused": True}),
        ("compiled", {"fused": True, "compiled": True}),
    ):

        def act(options: dict[str, Any] = options) -> None:
            hidden.grad = weight.grad = None
            sparse_soft_cross_entropy(hidden, weight, labels, ids, logprobs, kd_weight=0.9, **options).loss.backward()

        if GPU:
            torch.cuda.reset_peak_memory_stats()
        try:
            taken = seconds_of(act)
        except Exception as error:  # no compiler
            words.append(f"{name}: {type(error).__name__}")
            continue
        result.figures[name] = taken
        memory = f" ({torch.cuda.max_memory_allocated() / GIB:.1f} GiB)" if GPU else ""
        words.append(f"{name} {taken * 1e3:.0f} ms{memory}")
    floor = 6 * T * D * V / PEAK_FLOPS
    return f"{T} tokens: {', '.join(words)}; its products at {PEAK_FLOPS / 1e12:.0f} TFLOP/s take {floor * 1e3:.0f} ms"


# -- the step


class Bench:
    """Trainers of random models, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0

    @contextmanager
    def trainer(self, shape: Shape, **training: Any) -> Iterator[tuple[Trainer, Samples, list[list[int]], StepMemory]]:
        """A trainer, samples of two rows, and what its step is planned to hold."""
        self.made += 1
        where = self.folder / shape.name
        if not where.exists():
            write_model(shape, where)
        tree = {
            "run_dir": str(self.folder / f"run-{self.made}"),
            "student": {"model": str(where)},
            "data": {"train": "none.jsonl", "max_prompt_tokens": shape.longest // 2},
            "rollout": {"max_new_tokens": shape.longest // 2},
            "packing": {"length": shape.row},
            "training": {"precision": "bfloat16", "batch_tokens": 2 * shape.row, **training},
            "tracking": {"trackers": [], "report": False},
        }
        config = load_config(tree)
        store = Store(config.run_dir)
        accelerator = make_accelerator(config, store)
        store.open(config, "sft")
        student = models.load_model(config.student, trained=True)
        tokenizer: Any = SimpleNamespace(pad_token_id=0)
        trainer = Trainer(config, store, accelerator, student, tokenizer, Events(store.path / "events.jsonl"))
        samples, rows = write_samples(store, shape)
        try:
            yield trainer, samples, rows, step_memory(config, student.config, bfloat16=True)
        finally:
            del trainer, student, accelerator
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()


def write_model(shape: Shape, where: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.row,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with DEVICE:
        model = Qwen2ForCausalLM(config)
    model.bfloat16().save_pretrained(where)


def write_samples(store: Store, shape: Shape) -> tuple[Samples, list[list[int]]]:
    """Two rows full of samples whose lengths are log-normal; half of each is prompt at most."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < 2.2 * shape.row:
        lengths.append(int(np.clip(rng.lognormal(np.log(shape.longest / 8), 1.0), 8, shape.longest)))
    rows = []
    for i, length in enumerate(lengths):
        prompt = int(min(length // 2, 256))
        tokens = length - prompt
        ids = rng.integers(3, shape.vocabulary - TOP_K, tokens)
        rows.append(
            {
                "sample_id": f"s{i}",
                "prompt_id": f"p{i}",
                "source": "",
                "prompt_ids": rng.integers(3, shape.vocabulary, prompt),
                "response_ids": ids,
                "behavior_logprobs": np.full(tokens, -10.0, np.float32),
                "verdict": "proximal",
                "topk_ids": (ids[:, None] + np.arange(TOP_K)).ravel(),
                "topk_logprobs": np.full(tokens * TOP_K, -3.0, np.float32),
            }
        )
    store.write_part(0, 0, pa.Table.from_pylist(rows))
    samples = Samples(store)
    samples.fetch(0, 0)
    samples.add(0, 0)
    return samples, pack(samples.lengths.tolist(), shape.row)[:2]


def act(trainer: Trainer, samples: Samples, rows: list[list[int]], number: int) -> Any:
    tokens = int(samples.response_lengths[[i for row in rows for i in row]].sum())
    return trainer.step(samples, rows, tokens, number, 0.5)


def waits(bench: Bench, result: Result) -> str:
    """How often a step waits for the device, by CUDA's own watch."""
    shape = SMALL if GPU else TINY
    small = Shape(
        "shallow", 2, shape.hidden, shape.inner, shape.heads, shape.kv_heads, shape.vocabulary, shape.row // 4, 1024
    )
    if not GPU:
        small = TINY
    with bench.trainer(small, micro_batch_rows=1, batch_tokens=4 * small.row) as (trainer, samples, rows, _):
        for number in (1, 2):
            act(trainer, samples, rows, number)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            if GPU:
                torch.cuda.set_sync_debug_mode("warn")
            heard.clear()  # that warns of itself
            try:
                act(trainer, samples, rows, 3)
            finally:
                if GPU:
                    torch.cuda.set_sync_debug_mode("default")
    mine = [f"{Path(w.filename).name}:{w.lineno}" for w in heard if "synchroniz" in str(w.message)]
    result.figures = {"waits": float(len(mine)), "micro-batches": float(len(rows))}
    assert len(mine) <= 1, f"{len(mine)} waits: {mine}"
    return f"{len(mine)} in a step of {len(rows)} rows ({', '.join(mine)})"


def parking(bench: Bench, result: Result) -> str:
    """Weights and moments to CPU memory and back, and copies of the weights: equal, and how long they take."""
    shape = SMALL if GPU else TINY
    with bench.trainer(shape) as (trainer, samples, rows, _):
        act(trainer, samples, rows[:1], 1)

        def state() -> list[torch.Tensor]:
            moments = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
            return [*trainer.loss_model.parameters(), *trainer.loss_model.buffers(), *moments]

        before = [tensor.detach().clone() for tensor in state()]
        for turn in ("first", "second"):
            synchronize()
            began = time.perf_counter()
            with trainer.parked():
                synchronize()
                middle = time.perf_counter()
                assert all(t.device.type == "cpu" for t in trainer.loss_model.parameters())
            synchronize()
            result.figures[f"away, {turn}"] = middle - began
            result.figures[f"back, {turn}"] = time.perf_counter() - middle
        assert all(torch.equal(a, b) and a.device == b.device for a, b in zip(state(), before, strict=True))
        loss = act(trainer, samples, rows[:1], 2).loss
        assert np.isfinite(loss)
        held = sum(t.numel() * t.element_size() for t in before) / GIB
        del before
        pageable = [t.detach() for t in state()]
        began = time.perf_counter()
        away = [t.to("cpu") for t in pageable]
        result.figures["away, pageable"] = time.perf_counter() - began
        began = time.perf_counter()
        back = [t.to(DEVICE) for t in away]
        synchronize()
        result.figures["back, pageable"] = time.perf_counter() - began
        del away, back, pageable
        for dtype in (None, torch.bfloat16):
            name = "copy" if dtype is None else "copy in bfloat16"
            trainer.copy_policy(dtype)
            began = time.perf_counter()
            copied = trainer.copy_policy(dtype)
            result.figures[name] = time.perf_counter() - began
            assert copied is not None
            for key, value in trainer.base.state_dict().items():
                assert torch.equal(copied.weights[key], value.cpu().to(copied.weights[key].dtype)), key
    return f"{held:.1f} GiB: " + ", ".join(f"{name} {value:.2f} s" for name, value in result.figures.items())


def memory(bench: Bench, result: Result) -> str:
    """The peak of a step against what the plan says, with and without checkpointing."""
    shape = SMALL if GPU else TINY
    words = []
    for checkpointing in (True, False):
        with bench.trainer(shape, gradient_checkpointing=checkpointing) as (trainer, samples, rows, planned):
            plan = planned.total(checkpointing=checkpointing)
            if GPU and plan > USABLE * torch.cuda.get_device_properties(0).total_memory:
                words.append(f"without checkpointing planned {plan / GIB:.1f} GiB: not tried")
                continue
            act(trainer, samples, rows, 1)
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            act(trainer, samples, rows, 2)
            peak = torch.cuda.max_memory_allocated() if GPU else plan
        name = "checkpointing" if checkpointing else "plain"
        result.figures |= {f"{name} peak": peak, f"{name} planned": plan}
        words.append(f"{name} {peak / GIB:.1f} GiB, planned {plan / GIB:.1f}")
    assert all(result.figures[f"{n} peak"] <= 1.05 * result.figures[f"{n} planned"] for n in ("checkpointing",)), words
    return "; ".join(words)


def speed(bench: Bench, result: Result, shape: Shape, **training: Any) -> str:
    """Tokens a second of whole steps on rows of mixed lengths, and the share of the device's peak that they are."""
    with bench.trainer(shape, **training) as (trainer, samples, rows, planned):
        for number in (1, 2):
            act(trainer, samples, rows, number)
        taken = []
        for number in (3, 4, 5):
            synchronize()
            began = time.perf_counter()
            act(trainer, samples, rows, number)
            synchronize()
            taken.append(time.perf_counter() - began)
        ids = [i for row in rows for i in row]
        lengths, responses = samples.lengths[ids], int(samples.response_lengths[ids].sum())
        config = trainer.base.config
        head = config.vocab_size * config.hidden_size
        matrices = sum(p.numel() for p in trainer.base.parameters() if p.ndim == 2) - head
        pairs = float((lengths.astype(float) ** 2).sum()) / 2
        attention = 4 * pairs * config.hidden_size * config.num_hidden_layers
        operations = 3 * (2 * matrices * int(lengths.sum()) + 2 * head * responses + attention)
        best = min(taken)
        checkpointing = float(trainer.base.is_gradient_checkpointing)
    result.figures = {
        "tokens_per_second": int(lengths.sum()) / best,
        "response_tokens_per_second": responses / best,
        "seconds": best,
        "mfu": operations / best / PEAK_FLOPS,
        "checkpointing": checkpointing,
        "planned": planned.total(checkpointing=bool(checkpointing)),
    }
    how = f"attention {config._attn_implementation}, checkpointing {'on' if checkpointing else 'off'}"
    return f"{int(lengths.sum()) / best:,.0f} tokens/s, {operations / best / PEAK_FLOPS:.1%} of the peak ({how})"


CHECKS: dict[str, Callable[[Bench, Result], str]] = {
    "products": lambda _, result: products(result),
    "loss": lambda _, result: loss_values(result),
    "loss compiled": lambda _, result: loss_compiled(result),
    "loss speed": lambda _, result: loss_speed(result),
    "waits": waits,
    "parking": parking,
    "memory": memory,
    "speed 0.5B": lambda bench, result: speed(bench, result, SMALL if GPU else TINY),
    "speed 1.5B": lambda bench, result: speed(bench, result, LARGE if GPU else TINY),
}


def run_checks(names: Iterable[str], display: Display) -> list[Result]:
    """Each by itself; one that fails hinders no other."""
    results = []
    with tempfile.TemporaryDirectory(prefix="npd-step-") as folder:
        bench = Bench(Path(folder))
        for name in names:
            result, began = Result(name), time.monotonic()
            try:
                result.words = CHECKS[name](bench, result)
            except Exception as error:
                result.outcome, result.words = "FAILS", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                traceback.print_exc()
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
            result.seconds = time.monotonic() - began
            display.say(f"{name}: {result.outcome}, {result.seconds:.1f} s: {result.words}")
            results.append(result)
    return results


def check(names: Iterable[str], out: Path | None) -> bool:
    """Run checks, print their table, write them as JSON; did all of them work?"""
    device = torch.cuda.get_device_name() if GPU else f"CPU ({os.cpu_count()} cores)"
    display = Display()
    results = run_checks(names, display)
    rows = [[r.check, r.outcome, f"{r.seconds:.0f}", r.words] for r in results]
    display.table(f"Training step on {device}", ["check", "outcome", "s", "what was seen"], rows)
    if out is not None:
        found = [asdict(result) for result in results]
        write_json(out, {"device": device, "torch": torch.__version__, "results": found})
    return all(result.outcome == "works" for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*CHECKS], default=[*CHECKS], help="which checks [default: all]")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    raise SystemExit(not check(options.only, options.out))


if __name__ == "__main__":
    main()
