"""Divergences, those of a plug-in among them, against plain autograd over the full vocabulary in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import npd
from npd.config import load_config
from npd.errors import UserError
from npd.losses import TopKMass, check_divergence, divergence_of, sparse_soft_cross_entropy
from npd.records import StepLine
from npd.registry import DIVERGENCES, load_plugins
from npd.store import Store

PLUGIN = Path(__file__).parent / "plugins/divergences.py"
LEAST = math.exp(-40)
MASSES: tuple[TopKMass, ...] = ("raw", "renormalize", "tail")

BUILT_IN = tuple(DIVERGENCES)
load_plugins([str(PLUGIN)])


def make(seed, tokens=6, vocabulary=11, k=4, width=5, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    logprobs, ids = torch.randn(tokens, vocabulary, generator=g, dtype=torch.float64).log_softmax(-1).topk(k)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=g), ids, logprobs


def dense(name: str, inputs: tuple[Tensor, ...], mass: TopKMass) -> Tensor:
    """The divergence token by token, from probabilities over the whole vocabulary."""
    hidden, weight, _, ids, logprobs = inputs
    value = hidden.new_zeros(())
    for s, top, teacher in zip((hidden @ weight.T).softmax(-1), ids, logprobs.exp(), strict=True):
        outside = torch.ones(len(weight), dtype=torch.bool).index_fill(0, top, False)
        if mass == "renormalize":
            teacher = teacher / teacher.sum()
        pairs = list(zip(teacher, s[top], strict=True))
        if outside.any():
            pairs.append(((1 - teacher.sum()) if mass == "tail" else teacher.new_zeros(()), s[outside].sum()))
        for p_teacher, p_student in pairs:
            value = value + WRITTEN_OUT[name](p_teacher.clamp(min=LEAST), p_student)
    return value


def kl(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log()


WRITTEN_OUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2,
    "skewed_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skewed_reverse_kl": lambda p, q: kl(q, 0.1 * q + 0.9 * p),
    "total_variation": lambda p, q: (p - q).abs() / 2,
    "jeffreys": lambda p, q: kl(p, q.clamp(min=LEAST)) + kl(q.clamp(min=LEAST), p),
    "hellinger": lambda p, q: (torch.where(p > LEAST, p, 0).sqrt() - q.sqrt()) ** 2 / 2,
}
"""What a pair of probabilities contributes, teacher's and student's."""


@pytest.mark.parametrize("name", list(WRITTEN_OUT))
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 15),
    share=st.floats(0, 1),
    kd_weight=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    mass=st.sampled_from(MASSES),
    chunk=st.integers(1, 10),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_values_and_gradients_are_those_of_the_full_vocabulary(
    name, seed, tokens, vocabulary, share, kd_weight, mass, chunk, scale
):
    k = round(1 + share * (vocabulary - 1))
    inputs = make(seed, tokens, vocabulary, k, scale=scale)
    ours, theirs = ([x.clone().requires_grad_() for x in inputs[:2]] for _ in range(2))
    out = sparse_soft_cross_entropy(
        *ours, *inputs[2:], kd_weight=kd_weight, top_k_mass=mass, divergence=name, chunk_tokens=chunk
    )
    kd = dense(name, (*theirs, *inputs[2:]), mass)
    ce = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].T, inputs[2], reduction="sum")
    loss = (1 - kd_weight) * ce + kd_weight * kd
    assert out.kd.item() == pytest.approx(kd.item(), rel=1e-10, abs=1e-10)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-10, abs=1e-10)
    out.loss.backward()
    loss.backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine.grad - reference.grad).norm() <= 1e-10 * reference.grad.norm().clamp(min=1)


@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("mass", MASSES)
def test_gradcheck(name, mass):
    hidden, weight, labels, ids, logprobs = make(1, tokens=3, vocabulary=6, k=3, width=3)

    def loss(h, w):
        return sparse_soft_cross_entropy(
            h, w, labels, ids, logprobs, kd_weight=0.7, top_k_mass=mass, divergence=name, chunk_tokens=2
        ).loss

    assert gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("mass", MASSES)
def test_finite_in_float32_where_a_student_gives_next_to_nothing(name, mass):
    hidden, weight, labels, ids, logprobs = (x.float() if x.is_floating_point() else x for x in make(2, scale=300.0))
    hidden.requires_grad_(), weight.requires_grad_()
    out = sparse_soft_cross_entropy(hidden, weight, labels, ids, logprobs, kd_weight=0.9, top_k_mass=mass, divergence=name)
    out.loss.backward()
    assert all(x.isfinite().all() for x in (out.loss, hidden.grad, weight.grad))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("fused", [False, True])
def test_in_float32_a_rest_of_next_to_nothing_is_what_it_is_in_float64(name, fused):
    """A teacher that is sure leaves less than float32 can tell from 1, and the reverse KL asks for its logarithm."""
    hidden, weight, labels, _, _ = make(4, tokens=40, vocabulary=30)
    teacher = (
        torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 18 * torch.eye(30)[labels]
    )
    logprobs, ids = teacher.log_softmax(-1).topk(4)
    logprobs = logprobs.float()
    assert (1 - logprobs.double().exp().sum(-1)).min() < 1e-7
    found = [
        float(
            sparse_soft_cross_entropy(
                hidden.to(dtype), weight.to(dtype), labels, ids, logprobs.to(dtype), kd_weight=1.0, top_k_mass="tail",
                divergence=name, fused=fused,
            ).kd
        )
        for dtype in (torch.float64, torch.float32)
    ]  # fmt: skip
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_kind_may_be_given_itself():
    inputs = make(3)
    by_name = sparse_soft_cross_entropy(*inputs, kd_weight=0.9, top_k_mass="tail", divergence="reverse_kl")
    itself = sparse_soft_cross_entropy(*inputs, kd_weight=0.9, top_k_mass="tail", divergence=DIVERGENCES["reverse_kl"])
    assert by_name.loss == itself.loss
    assert by_name.loss != sparse_soft_cross_entropy(*inputs, kd_weight=0.9, top_k_mass="tail").loss


class _Sweeps(TorchDispatchMode):
    """Counts the operations on whole chunks of logits, by name."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.counts = vocabulary, Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == self.vocabulary:
            self.counts[func.overloadpacket.__name__] += 1
        return out


def swept(name: str, mass: str) -> Counter[str]:
    hidden, weight, labels, ids, logprobs = make(4, tokens=6, vocabulary=11)
    with _Sweeps(11) as seen:
        sparse_soft_cross_entropy(
            hidden.requires_grad_(), weight, labels, ids, logprobs, kd_weight=0.9, top_k_mass=mass, divergence=name,  # type: ignore[arg-type]
            chunk_tokens=3,
        )  # fmt: skip
    return seen.counts


@pytest.mark.parametrize("mass", ["raw", "renormalize", "tail"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_divergence_sweeps_the_logits_as_often_as_the_forward_kl(name, mass):
    """A rest that counts costs writing K entries of each row, and no sweep."""
    assert swept("forward_kl", "raw")["exp_"] == 2  # of two chunks
    assert swept(name, mass) - swept("forward_kl", "raw") in (Counter(), Counter({"scatter_": 2}))


def test_without_a_teacher_no_divergence_is_asked():
    def broken(teacher: Tensor, student: Tensor) -> Tensor:
        raise AssertionError

    hidden, weight, labels, _, _ = make(5)
    none = torch.empty(6, 0)
    out = sparse_soft_cross_entropy(
        hidden.requires_grad_(), weight, labels, none.long(), none, kd_weight=0.0, divergence=broken
    )
    out.loss.backward()
    assert float(out.kd) == 0


def test_inference_mode_gives_the_same_values():
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in make(6)]
    expected = sparse_soft_cross_entropy(*inputs, kd_weight=0.9, top_k_mass="tail", divergence="jensen_shannon")
    with torch.inference_mode():
        out = sparse_soft_cross_entropy(*inputs, kd_weight=0.9, top_k_mass="tail", divergence="jensen_shannon")
    assert (out.loss, out.kd) == (expected.loss, expected.kd)


def test_what_is_no_sheet_is_refused():
    with pytest.raises(
        ValueError, match=r"what each entry contributes, here \(6, 5\), but this one's result has the shape \(\)"
    ):
        sparse_soft_cross_entropy(*make(7), kd_weight=0.9, divergence=lambda teacher, student: student.sum())
    with pytest.raises(UserError, match=r"loss\.divergence is 'revers_kl'.*did you mean 'reverse_kl'"):
        sparse_soft_cross_entropy(*make(7), kd_weight=0.9, divergence="revers_kl")


def test_a_run_minimises_what_its_configuration_names(make_tree):
    first = {}
    for name in ("forward_kl", "jensen_shannon"):
        tree = make_tree(name, loss={"divergence": name, "top_k_mass": "tail"}, training={"max_steps": 2})
        assert load_config(tree | {"plugins": [str(PLUGIN)]}).loss.divergence == name
        npd.distill(tree | {"plugins": [str(PLUGIN)]})
        first[name] = next(line for line in Store(tree["run_dir"]).read_metrics() if isinstance(line, StepLine))
    assert first["forward_kl"].ce == first["jensen_shannon"].ce
    assert 0 < first["jensen_shannon"].kd <= math.log(2)
    assert first["jensen_shannon"].kd != first["forward_kl"].kd


@pytest.mark.parametrize(("name", "options"), [
    ("jensen_shannon", {"beta": 0.1}), ("jensen_shannon", {"beta": 0.9}), ("skewed_forward_kl", {"alpha": 0.4}),
    ("skewed_reverse_kl", {"alpha": 0.4}),
])  # fmt: skip
def test_options_are_the_formulas(name, options):
    share = next(iter(options.values()))
    written_out: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "jensen_shannon": lambda p, q: (
            share * kl(p, share * p + (1 - share) * q) + (1 - share) * kl(q, share * p + (1 - share) * q)
        ),
        "skewed_forward_kl": lambda p, q: kl(p, share * p + (1 - share) * q),
        "skewed_reverse_kl": lambda p, q: kl(q, share * q + (1 - share) * p),
    }
    teacher, student = (torch.randn(5, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    found = divergence_of(name, options)(teacher, student)
    torch.testing.assert_close(found, written_out[name](teacher.exp(), student.exp()))


@pytest.mark.parametrize("name", [name for name in WRITTEN_OUT if name in BUILT_IN] + ["forward_kl"])
def test_equal_distributions_are_no_distance_apart_and_others_are(name):
    """With K = V, and with the rest as one symbol; k = 1 too."""
    hidden, weight, labels, _, _ = make(8, vocabulary=9)
    full = (hidden @ weight.T).log_softmax(-1)
    for k in (1, 4, 9):
        logprobs, ids = full.topk(k)
        out = sparse_soft_cross_entropy(
            hidden, weight, labels, ids, logprobs, kd_weight=1.0, top_k_mass="tail", divergence=name
        )
        assert abs(float(out.kd)) < 1e-12
        other = sparse_soft_cross_entropy(
            -hidden, weight, labels, ids, logprobs, kd_weight=1.0, top_k_mass="tail", divergence=name
        )
        assert float(other.kd) > 0.01


@pytest.mark.parametrize("name", [*BUILT_IN])
def test_a_kept_top_k_with_its_tail_never_shows_more_than_the_whole_vocabulary(name):
    """Symbols taken together lose information (data processing): what is seen is a lower bound, and grows with K."""
    hidden, weight, labels, _, _ = make(9, tokens=40, vocabulary=30)
    full = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    seen = []
    for k in (1, 3, 10, 30):
        logprobs, ids = full.topk(k)
        seen.append(float(sparse_soft_cross_entropy(
            hidden, weight, labels, ids, logprobs, kd_weight=1.0, top_k_mass="tail", divergence=name).kd))  # fmt: skip
    assert seen == sorted(seen)


@pytest.mark.parametrize(("name", "options", "words"), [
    ("jensen_shannon", {"beta": 1.0}, "beta must lie between 0 and 1"), ("jensen_shannon", {"bta": 0.5}, "bta"),
    ("reverse_kl", {"beta": 0.5}, "it takes none"), ("skewed_forward_kl", {"alpha": "x"}, "loss.options do not fit"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        check_divergence(name, "tail", options)
