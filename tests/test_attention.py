"""Samples end to end: as each alone, in value and gradient, with nothing in memory that grows with the square of a row."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from npd import attention
from npd.attention import NAME, by_sample, end_to_end
from npd.config import ModelConfig, load_config
from npd.demo.tokenizer import build_tokenizer
from npd.models import batches_for, expected_reading, hidden_states, layout_of, load_model, prove_layout
from npd.packing import end_to_end as laid_out
from npd.packing import pack_tokens, short_rows
from npd.preflight import prepare
from npd.store import Store
from npd.store.provenance import in_rows

SHAPE: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, Any] = {
    "many heads": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2, num_key_value_heads=4)),
    "grouped": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2, num_key_value_heads=2)),
    "one key head": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2, num_key_value_heads=1)),
    "windows": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, num_hidden_layers=2, num_key_value_heads=2, sliding_window=5)
    ),
    "some windows": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE,
            num_hidden_layers=2,
            num_key_value_heads=2,
            sliding_window=5,
            query_pre_attn_scalar=8,
            layer_types=SLIDING,
        )
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> PreTrainedModel:
    torch.manual_seed(3)
    made: PreTrainedModel = MODELS[request.param]().eval()
    assert prove_layout(made, request.param, varlen=True).mode == "varlen"
    return made


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in float64, as transformers alone computes with them."""
    twin = type(model)(type(model.config).from_dict(model.config.to_dict())).double().eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config._attn_implementation == "sdpa"
    return twin


def samples_of(lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(lengths)
    return [generator.integers(3, 20, size=n).tolist() for n in lengths]


# -- equality


@settings(max_examples=12)
@given(lengths=st.lists(st.one_of(st.just(1), st.integers(2, 30)), min_size=1, max_size=6), tokens=st.integers(1, 90))
def test_samples_and_gradients_are_those_of_each_alone(model, lengths, tokens):
    samples = samples_of(lengths)
    twin = plain(model)
    model.zero_grad()
    seen = set()
    total = torch.zeros(())
    for rows, length in batches_for(model, lengths, tokens):
        assert len(rows) == 1
        assert length == sum(lengths[i] for i in rows[0])
        packed = pack_tokens(samples, [[]] * len(samples), rows, length, 0)
        hidden = hidden_states(
            model, packed.input_ids, packed.position_ids, cu_seq_lens=packed.cu_seq_lens, lengths=packed.lengths
        )
        for i, mine in zip(packed.samples, hidden[0].split(packed.lengths), strict=True):
            theirs = twin.model(input_ids=torch.tensor([samples[i]]), use_cache=False).last_hidden_state[0]
            assert float(((mine - theirs).norm() / theirs.norm()).detach()) < 1e-5
            weight = torch.sin(torch.arange(theirs.numel(), dtype=torch.float64)).view_as(theirs)
            (theirs * weight).sum().backward()
            total = total + (mine * weight.float()).sum()
            seen.add(i)
    total.backward()
    assert seen == set(range(len(lengths)))
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is None or not float(theirs.grad.norm()):  # of one token alone, queries and keys change nothing
            continue
        wrong = float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm())
        assert wrong < 1e-5 or float(theirs.grad.norm()) < 1e-3, name


def by_definition(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Attention [R, L, H, D] in float64, token by token."""
    R, H, L, _ = query.shape
    q, k, v = (x.double().transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    group = H // key.shape[1]
    out = torch.empty(R * L, H, v.shape[-1], dtype=torch.float64)
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            first = start if window is None else max(start, i - window + 1)
            for h in range(H):
                weight = (k[first : i + 1, h // group] @ q[i, h] * 0.3).softmax(0)
                out[i, h] = weight @ v[first : i + 1, h // group]
        start += length
    return out.view(R, L, H, -1)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    groups=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    window=st.one_of(st.none(), st.integers(1, 16)),
    block=st.integers(1, 6),
    told=st.booleans(),
)
def test_attention_by_its_definition(lengths, groups, window, block, told):
    H, K = groups
    torch.manual_seed(sum(lengths))
    q, k = (torch.randn(1, heads, sum(lengths), 8, requires_grad=True) for heads in groups)
    v = torch.randn(1, K, sum(lengths), 6, requires_grad=True)
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SMALLEST_BLOCK", block)
        patch.setattr(attention, "LARGEST_BLOCK", block)
        mine = by_sample(q, k, v, lengths if told else None, cu, window, 0.0, 0.3)
    theirs = by_definition(q, k, v, lengths, window)
    assert mine.shape == (1, sum(lengths), H, 6)
    assert torch.allclose(mine.double(), theirs, rtol=0, atol=1e-5)
    weight = torch.sin(torch.arange(mine.numel(), dtype=torch.float64)).view_as(theirs)
    ours = torch.autograd.grad((mine * weight.float()).sum(), (q, k, v))
    wanted = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    for a, b in zip(ours, wanted, strict=True):
        assert float((a - b).abs().max()) < 1e-4


def kernel_of(taken: frozenset[str]):
    """What torch's kernel does, by its documentation, in a version whose arguments are these."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        assert set(options) <= taken
        assert q.shape[1] == k.shape[1] or options.get("enable_gqa")
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == int(cu_q.diff().max())
        left, right = options.get("window_size", (-1, 0 if options.get("is_causal") else -1))
        assert right == 0
        scale = options.get("scale") or q.shape[-1] ** -0.5
        q, k, v = (x.transpose(0, 1)[None] for x in (q * (scale / 0.3), k, v))
        return by_definition(q, k, v, cu_q.diff().tolist(), None if left < 0 else left + 1)[0]

    return varlen_attn


@pytest.mark.parametrize(
    "taken", [{"window_size", "enable_gqa", "scale"}, {"window_size", "scale"}, {"is_causal", "scale"}, {"is_causal"}]
)
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_called_as_each_version_wants_it(monkeypatch, taken, window):
    if "window_size" not in taken:
        window = None  # such a version is not asked for windows: see `_kernel`
    monkeypatch.setattr(attention, "TAKEN", frozenset(taken))
    monkeypatch.setattr(attention, "varlen_attn", kernel_of(frozenset(taken)))
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 9, 6, dtype=torch.float64) for heads in (4, 2, 2))
    lengths = [4, 5, 1, 6, 2]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    mine = attention._by_kernel(q, k, v, cu, 6, window, 0.3)
    assert torch.allclose(mine, by_definition(q, k, v, lengths, window))


def test_an_empty_batch(model):
    assert list(batches_for(model, [], 10)) == []
    none = torch.empty(1, 4, 0, 8)
    assert by_sample(none, none, none, [], torch.zeros(1, dtype=torch.int32), None, 0.0, 1.0).shape == (1, 0, 4, 8)


def test_padded_rows_are_read_too(model):
    """Beside a model that needs them, in rows whose padding is a sample of its own."""
    lengths = [9, 4, 7, 2]
    samples = samples_of(lengths)
    for rows, length in short_rows(lengths, 20):
        packed = pack_tokens(samples, [[]] * 4, rows, length, 0)
        assert sum(packed.lengths) == packed.input_ids.numel()
        assert packed.cu_seq_lens.tolist() == [0, *np.cumsum(packed.lengths)]
        told: dict[str, Any] = {"cu_seq_lens": packed.cu_seq_lens, "lengths": packed.lengths}
        with torch.no_grad():
            hidden, again = (hidden_states(model, *packed[:2], **options) for options in (told, {}))
        assert torch.equal(hidden, again)  # the lengths follow from the positions
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                theirs = plain(model).model(input_ids=torch.tensor([samples[i]])).last_hidden_state[0]
                assert torch.allclose(hidden[r, at : at + lengths[i]].double(), theirs, atol=1e-5)
                at += lengths[i]


@given(st.lists(st.integers(1, 70), max_size=40), st.integers(1, 100))
def test_rows_end_to_end_hold_every_sample_once(lengths, tokens):
    batches = list(laid_out(lengths, tokens))
    assert sorted(i for [row], _ in batches for i in row) == list(range(len(lengths)))
    for [row], length in batches:
        assert length == sum(lengths[i] for i in row)
        assert length <= tokens or len(row) == 1
        assert [lengths[i] for i in row] == sorted((lengths[i] for i in row), reverse=True)
    for ([a], _), ([b], _) in pairwise(batches):
        assert max(a) < min(b)
        assert sum(lengths[i] for i in a) + lengths[min(b)] > tokens


# -- the same model in other hands


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "windows"
    torch.manual_seed(3)
    MODELS["windows"]().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def test_it_generates_as_before(saved, tmp_path):
    model = load_model(ModelConfig(model=str(saved)))
    assert layout_of(model).mode == "varlen"
    assert model.config._attn_implementation == NAME
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [4, 9, 10, 5, 6, 3, 8], [0, 0, 0, 0, 0, 0, 11]])
    options: dict[str, Any] = {"attention_mask": (ids > 0).long(), "max_new_tokens": 12, "do_sample": False}
    for cached in (True, False):
        mine, wanted = (m.generate(ids, use_cache=cached, **options) for m in (model, theirs))  # type: ignore[operator]
        assert torch.equal(mine, wanted)
    model.save_pretrained(tmp_path / "again")
    assert NAME not in (tmp_path / "again/config.json").read_text()


@pytest.mark.parametrize("family", ["gemma2", "stablelm", "gptj", "falcon", "qwen3_next", "falcon-alibi"])
def test_what_cannot_be_read_so_is_read_in_rows_and_says_why(family):
    model = model_of(family)
    before = model.config._attn_implementation
    layout = prove_layout(model, family, varlen=True)
    assert layout.mode != "varlen"
    assert model.config._attn_implementation == before
    assert layout.why
    assert "(not end to end: " in expected_reading(model.config)


def test_only_auto_reads_so(saved):
    for name in ("rows", "sdpa", "eager"):
        model = load_model(ModelConfig(model=str(saved), attention=name))
        assert layout_of(model).mode == "packed"
        assert model.config._attn_implementation == ("eager" if name == "eager" else "sdpa")
        assert expected_reading(model.config, name).endswith(f"(not end to end: attention is {name})")
    assert expected_reading(model.config) == "samples end to end, without padding or masks"


def test_layers_that_mix_samples_are_found(saved, monkeypatch):
    inner = attention.npd_varlen

    def leaking(module, query, key, value, attention_mask, **options):
        if "cu_seq_lens_q" in options:  # as if the row were one sample
            options |= {"cu_seq_lens_q": options["cu_seq_lens_q"][[0, -1]], "sample_lengths": [query.shape[2]]}
        return inner(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, NAME, leaking)
    layout = layout_of(load_model(ModelConfig(model=str(saved))))
    assert layout.mode == "packed"
    assert "a sample differs from itself alone by" in layout.why


@pytest.mark.parametrize(("drops", "words"), [("cu_seq_lens_q", "drop arguments"), ("attention_mask", "makes masks")])
def test_models_that_drop_what_they_are_told_are_found(monkeypatch, drops, words):
    forward = LlamaModel.forward

    def dropping(self, input_ids=None, **kwargs):
        kwargs[drops] = None
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", dropping)
    assert words in prove_layout(MODELS["grouped"](), "it", varlen=True).why


# -- memory


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("window", [None, 600])
def test_a_long_row_takes_memory_by_its_tokens(window):
    L = 32768
    shape = SHAPE | {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": L}
    config = MistralConfig(**shape, num_hidden_layers=1, num_key_value_heads=1, sliding_window=window)
    model = MistralForCausalLM(config)
    prove_layout(model, "it", varlen=True)
    lengths = [2048] * 15 + [1024, 1023, 1]
    ids = torch.full((1, L), 5)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with Largest() as seen:
        hidden_states(model, ids, positions, cu_seq_lens=cu, lengths=lengths).sum().backward()
    assert seen.elements <= L * config.intermediate_size
    assert seen.elements < L * L / 500
    # Windows of any length in samples of any length: a block of queries sees no more than the window before it.
    if window:
        assert attention.LARGEST_BLOCK * (attention.LARGEST_BLOCK + window) < L * config.intermediate_size * 2


# -- what is not eager, and what is older


@pytest.mark.slow
def test_a_compiled_decoder_takes_any_lengths():
    torch.manual_seed(3)
    model = MODELS["grouped"]().eval()
    prove_layout(model, "it", varlen=True)
    torch._dynamo.reset()
    compiled = torch.compile(model.model.forward, dynamic=True, backend="eager")
    samples = samples_of([9, 3, 12, 1, 7, 7, 5, 2, 8, 4])
    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        for first in range(0, 9, 2):
            some = samples[first:]
            lengths = [len(s) for s in some]
            packed = pack_tokens(some, [[]] * len(some), [list(range(len(some)))], sum(lengths), 0)
            told: dict[str, Any] = {"cu_seq_lens": packed.cu_seq_lens, "lengths": packed.lengths}
            mine = hidden_states(model, *packed[:2], compiled, **told)
            assert torch.allclose(mine, hidden_states(model, *packed[:2], **told), atol=1e-5)


def test_an_older_run_goes_on_in_rows(make_tree):
    given_ = load_config(make_tree("new", student={"attention": "auto"}))
    store = Store(given_.run_dir)
    store.open(given_, "distill")
    assert not store.began_in_rows
    store.open(given_, "distill")
    assert not store.began_in_rows
    file = store.path / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    assert tree["provenance"].pop("varlen") is True
    file.write_text(yaml.safe_dump(tree))  # as a version wrote it that did not know
    for _ in range(2):
        assert store.began_in_rows
        store.open(given_, "distill")  # a newer version goes on with it, and with its ways
    begun = prepare(given_, "distill").config
    assert begun.student.attention == "rows"
    assert all(teacher.attention == "rows" for teacher in begun.all_teachers.values())
    chosen = load_config(make_tree("new", student={"attention": "sdpa"}))
    assert in_rows(chosen).student.attention == "sdpa"


def test_end_to_end_says_where_samples_begin():
    told = end_to_end(torch.tensor([0, 3, 4], dtype=torch.int32), [3, 1])
    assert told["max_length_q"] == 3
    assert told["sample_lengths"] == [3, 1]
    assert "sample_lengths" not in end_to_end(torch.tensor([0, 3, 4], dtype=torch.int32), [3, 1], compiled=True)
    assert json.dumps(told["max_length_q"]) == "3"
    assert math.prod(told["attention_mask"].shape) == 0
