"""What `npd.attention` computes on this machine's GPU, against plain attention of each sample.

    python scripts/check_attention.py [--only NAME ...] [--out FILE.json]

Each check is a function that gives words, and raises where something is wrong; none needs another, or anything from the
network.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from npd import attention
from npd.attention import by_sample, npd_varlen
from npd.models import hidden_states, prove_layout
from npd.observe.display import Display
from npd.packing import short_rows
from npd.store import write_json

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LENGTHS = [700, 1, 1, 129, 64, 128, 333, 2, 512, 17]
# Heads, heads of keys, width of a head, window.
SHAPES: list[tuple[int, int, int, int | None]] = [
    *((8, 8, 64, None), (9, 3, 64, None), (8, 1, 128, None), (4, 2, 256, None), (8, 4, 80, None), (4, 2, 60, None)),
    *((8, 8, 64, 128), (9, 3, 64, 100), (8, 2, 128, 2), (8, 1, 64, 300), (8, 2, 64, 4096)),
]


class Skip(Exception):
    """Why a check can't be made here."""


def by_definition(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """Attention [1, N, H, D] of each sample by itself, scores and all."""
    H = q.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for a, b, c in zip(*(x[0].split(list(lengths), 1) for x in (q, k, v)), strict=True):
        scores = a @ b.transpose(1, 2) * a.shape[-1] ** -0.5
        at = torch.arange(a.shape[1], device=a.device)
        back = at[:, None] - at
        seen = (back >= 0) & (back < (window or len(at)))
        outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ c)
    return torch.cat(outputs, 1).transpose(0, 1)[None]


def tensors(H: int, K: int, D: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Query, key and value [1, heads, N, D], what the output's gradient is, and where samples begin."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    N = sum(LENGTHS)
    drawn = [torch.randn(1, N, heads, D, device=DEVICE, generator=generator).transpose(1, 2) for heads in (H, K, K)]
    weight = torch.randn(1, N, H, D, device=DEVICE, generator=generator)
    cu = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32, device=DEVICE)
    return [x.to(dtype).requires_grad_() for x in drawn], weight.to(dtype), cu


def with_gradients(act: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    out = act(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


def apart(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(mine, theirs, strict=True))


def call(inputs: Sequence[Tensor], cu: Tensor, window: int | None) -> Tensor:
    """The registered function, as a model calls it."""
    told = attention.end_to_end(cu, LENGTHS)
    mask = told.pop("attention_mask")
    q, k, v = inputs
    return npd_varlen(torch.nn.Module(), q, k, v, mask, sliding_window=window, **told)[0]


def kernels_agree() -> str:
    """varlen_attn, forward and backward, with windows and grouped heads, against float64 by the definition."""
    if not GPU:
        raise Skip("needs a GPU")
    worst, wrong = [], []
    for H, K, D, window in SHAPES:
        inputs, weight, cu = tensors(H, K, D, torch.bfloat16)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        exact = with_gradients(lambda q, k, v, w=window: by_definition(q, k, v, LENGTHS, w), wide, weight.double())
        # What rounding alone does: the same, sample by sample, in the same type.
        plain = with_gradients(
            lambda q, k, v, c=cu, w=window: by_sample(q, k, v, LENGTHS, c, w, 0.0, q.shape[-1] ** -0.5),
            inputs,
            weight,
        )
        mine = with_gradients(lambda *x, c=cu, w=window: call(x, c, w), inputs, weight)
        ours, theirs = apart(mine, exact), apart(plain, exact)
        fused = attention._kernel(inputs[0], inputs[2], window, 0.0) is not None
        name = f"{H}/{K} heads of {D}{'' if window is None else f', window {window}'}"
        worst.append(ours / max(theirs, 1e-9))
        if not fused or not ours <= max(2 * theirs, 1e-2):
            wrong.append(f"{name}: {ours:.2g} apart, sdpa {theirs:.2g}{'' if fused else ', not by the kernel'}")
    assert not wrong, "; ".join(wrong)
    return (
        f"torch {torch.__version__} with {', '.join(sorted(attention.TAKEN & {'window_size', 'enable_gqa', 'scale'}))}: in "
        f"{len(SHAPES)} shapes no further from float64 than {max(worst):.2f} times what sdpa is in bfloat16"
    )


def sample_by_sample_agrees() -> str:
    """What goes without the kernel, in float32: forward and backward against float64 by the definition."""
    found = []
    for H, K, D, window in SHAPES:
        inputs, weight, cu = tensors(H, K, D, torch.float32)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        exact = with_gradients(lambda q, k, v, w=window: by_definition(q, k, v, LENGTHS, w), wide, weight.double())
        found.append(apart(with_gradients(lambda *x, c=cu, w=window: call(x, c, w), inputs, weight), exact))
    assert max(found) < 1e-5, f"{max(found):.2g} apart"
    return f"at most {max(found):.2g} apart in {len(SHAPES)} shapes"


def model_of(window: int | None, *, layers: int = 4, hidden: int = 512, most: int = 32768) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": most, "initializer_range": 0.06,
    }  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    if window is not None:
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
    return model.eval().to(DEVICE)


def batch(lengths: Sequence[int]) -> dict[str, Any]:
    """Arguments of `hidden_states` for a row of samples."""
    drawn = np.random.default_rng(0).integers(3, 1024, sum(lengths))
    return {
        "input_ids": torch.from_numpy(drawn)[None].to(DEVICE),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE),
        "cu_seq_lens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE),
        "lengths": list(lengths),
    }


@contextmanager
def no_waiting() -> Any:
    """Inside, the CPU must not wait for the GPU."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


def models_agree() -> str:
    """A whole model under autocast: hidden states and gradients end to end against each sample alone; no waiting in it."""
    words = []
    for window in (None, 100):
        model = model_of(window)
        layout = prove_layout(model, "the model", varlen=True)
        assert layout.mode == "varlen", layout.why
        given = batch(LENGTHS)
        autocast = torch.autocast(DEVICE, torch.bfloat16) if GPU else nullcontext()
        with autocast:
            hidden_states(model, **given)  # warms up
            with no_waiting():
                mine = hidden_states(model, **given)
        weight = torch.sin(torch.arange(mine.numel(), device=DEVICE)).view_as(mine)
        (mine * weight).sum().backward()
        gradients = [p.grad.clone() for p in model.model.parameters()]
        model.zero_grad()
        alone = []
        with autocast:
            for ids in given["input_ids"][0].split(LENGTHS):
                alone.append(model.model(input_ids=ids[None], use_cache=False).last_hidden_state)
        theirs = torch.cat(alone, 1)
        (theirs * weight).sum().backward()
        far = apart([mine.detach()], [theirs.detach()])
        steep = apart(
            [torch.cat([g.flatten() for g in gradients])], [torch.cat([p.grad.flatten() for p in model.model.parameters()])]
        )
        bound = 3e-2 if GPU else 1e-5
        assert max(far, steep / 2) < bound, f"window {window}: hidden states {far:.2g}, gradients {steep:.2g} apart"
        words.append(f"{'no window' if window is None else f'window {window}'}: {far:.1g}, gradients {steep:.1g} apart")
    return "; ".join(words)


def generation_agrees() -> str:
    """Prompts padded on the left, with and without a cache, in the float32 that greedy tokens need to be comparable."""
    for window in (None, 24):
        model = model_of(window, layers=2)
        plain = copy.deepcopy(model)
        assert prove_layout(model, "the model", varlen=True).mode == "varlen"
        ids = torch.randint(3, 1024, (4, 40), device=DEVICE)
        mask = torch.ones_like(ids)
        for row, padding in enumerate((0, 7, 31, 39)):
            mask[row, :padding] = 0
        for cached in (True, False):
            options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "use_cache": cached}
            mine, theirs = (m.generate(ids, pad_token_id=0, eos_token_id=2, **options) for m in (model, plain))
            assert torch.equal(mine, theirs), f"window {window}, cache {cached}: other tokens"
    return "the same greedy tokens as with sdpa"


def a_long_row_fits() -> str:
    """Peak memory of one row of 32,768 tokens, forward and backward, against one of half as many."""
    if not GPU:
        raise Skip("needs a GPU")
    words = []
    for window in (None, 1024):
        model = model_of(window, layers=2)
        assert prove_layout(model, "the model", varlen=True).mode == "varlen"
        peaks = []
        for tokens in (16384, 32768):
            given = batch([tokens // 2, tokens // 4, *[tokens // 64] * 16])
            model.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast(DEVICE, torch.bfloat16):
                hidden_states(model, **given).float().square().mean().backward()
            peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        assert peaks[1] < 2.3 * peaks[0], f"{peaks[0]:.0f} MiB, and {peaks[1]:.0f} for twice as many tokens"
        words.append(f"{'no window' if window is None else f'window {window}'}: {peaks[1]:.0f} MiB ({peaks[0]:.0f} for half)")
    return "; ".join(words)


def it_compiles() -> str:
    """The decoder compiled: the same hidden states for any lengths, in few programs."""
    model = model_of(None, layers=2)
    assert prove_layout(model, "the model", varlen=True).mode == "varlen"
    torch._dynamo.reset()
    compiled = torch.compile(model.model.forward, dynamic=True)
    seconds, found = [], []
    for first in range(6):
        given = batch(LENGTHS[first:])
        began = time.monotonic()
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16) if GPU else nullcontext():
            mine, theirs = (hidden_states(model, decoder=decoder, **given) for decoder in (compiled, None))
        found.append(apart([mine], [theirs]))
        seconds.append(time.monotonic() - began)
    assert max(found) < (3e-2 if GPU else 1e-5), f"{max(found):.2g} apart"
    return f"at most {max(found):.1g} apart; calls took {', '.join(f'{s:.1f}' for s in seconds)} s"


def it_is_faster() -> str:
    """Forward and backward passes of packed samples of mixed lengths, against padded rows with masks; interleaved medians."""
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 300, 400), 4096).tolist()[: 160 if GPU else 12]
    model, masked = model_of(None), model_of(None)
    assert prove_layout(model, "the model", varlen=True).mode == "varlen"
    prove_layout(masked, "the model")
    unpadded = batch(sorted(lengths, reverse=True))
    padded = []
    for rows, length in short_rows(lengths, 16384):
        sizes = [[*(lengths[i] for i in r), length - sum(lengths[i] for i in r)] for r in rows]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in sizes])
        padded.append({"input_ids": torch.full(positions.shape, 7).to(DEVICE), "position_ids": positions.to(DEVICE)})

    def step(which: Any, batches: list[dict[str, Any]]) -> float:
        began = time.perf_counter()
        for given in batches:
            with torch.autocast(DEVICE, torch.bfloat16) if GPU else nullcontext():
                hidden_states(which, **given).float().square().mean().backward()
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    contenders = {"end to end": (model, [unpadded]), "rows": (masked, padded)}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(6):
        for name, (which, batches) in contenders.items():
            seconds = step(which, batches)
            if turn:
                found[name].append(seconds)
    rates = {name: sum(lengths) / statistics.median(seconds) for name, seconds in found.items()}
    return ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()) + (
        f" tokens/s: {rates['end to end'] / rates['rows']:.2f} x ({len(lengths)} samples, longest {max(lengths)})"
    )


CHECKS: dict[str, Callable[[], str]] = {
    "kernels": kernels_agree,
    "sample by sample": sample_by_sample_agrees,
    "models": models_agree,
    "generation": generation_agrees,
    "a long row": a_long_row_fits,
    "compiled": it_compiles,
    "speed": it_is_faster,
}


def check(names: Iterable[str], out: Path | None) -> bool:
    """Run checks, each by itself, print their table, write them as JSON; did all that could be made here work?"""
    device = torch.cuda.get_device_name() if GPU else f"CPU ({os.cpu_count()} cores)"
    display = Display()
    results: list[dict[str, Any]] = []
    for name in names:
        began = time.monotonic()
        try:
            outcome, words = "works", CHECKS[name]()
        except Skip as why:
            outcome, words = "skipped", str(why)
        except Exception as error:
            outcome, words = "FAILS", f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            traceback.print_exc()
        seconds = time.monotonic() - began
        display.say(f"{name}: {outcome}, {seconds:.1f} s: {words}")
        results.append({"check": name, "outcome": outcome, "seconds": seconds, "words": words})
        if GPU:
            torch.cuda.empty_cache()
    rows = [[r["check"], r["outcome"], f"{r['seconds']:.0f}", r["words"]] for r in results]
    display.table(f"Attention on {device}", ["check", "outcome", "s", "what was seen"], rows)
    if out is not None:
        write_json(out, {"device": device, "torch": torch.__version__, "results": results})
    return all(result["outcome"] != "FAILS" for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*CHECKS], default=[*CHECKS], help="which checks [default: all]")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    raise SystemExit(not check(options.only, options.out))


if __name__ == "__main__":
    main()
