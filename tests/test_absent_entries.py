"""Top-k in which entries are missing: their tokens belong to the rest, and a position without any has cross-entropy alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_divergences import LEAST, MASSES, WRITTEN_OUT, kl, make
from torch import Tensor

from npd.losses import sparse_soft_cross_entropy
from npd.registry import DIVERGENCES

ALL = WRITTEN_OUT | {"forward_kl": lambda p, q: torch.where(p > LEAST, kl(p, q), 0 * q)}


def dense(name: str, hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, mass: str) -> Tensor:
    """Position by position, from those entries alone that are there."""
    value = hidden.new_zeros(())
    for s, top, teacher in zip((hidden @ weight.T).softmax(-1), ids, logprobs, strict=True):
        there = teacher > -torch.inf
        if not there.any():
            continue
        top, teacher = top[there], teacher[there].exp()
        outside = torch.ones(len(weight), dtype=torch.bool).index_fill(0, top, False)
        if mass == "renormalize":
            teacher = teacher / teacher.sum()
        rest = (1 - teacher.sum()).clamp(min=0) if mass == "tail" else teacher.new_zeros(())
        for p_teacher, p_student in [*zip(teacher, s[top], strict=True), (rest, s[outside].sum())]:
            value = value + ALL[name](p_teacher.clamp(min=LEAST), p_student)
    return value


@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("fused", [False, True])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 6),
    kd_weight=st.sampled_from([0.3, 0.9, 1.0]),
    mass=st.sampled_from(MASSES),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    label_absent=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_entries_that_are_there(
    name, fused, seed, k, kd_weight, mass, share, label_absent
):
    hidden, weight, labels, ids, logprobs = make(seed, tokens=7, vocabulary=11, k=k)
    g = torch.Generator().manual_seed(seed)
    logprobs = logprobs.masked_fill(torch.rand(logprobs.shape, generator=g) < share, -torch.inf)
    if label_absent:  # an id that does not matter may be the label's
        labels = ids[:, -1].clone()
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    out = sparse_soft_cross_entropy(
        ours[0],
        ours[1],
        labels,
        ids,
        logprobs,
        kd_weight=kd_weight,
        top_k_mass=mass,
        divergence=name,
        chunk_tokens=3,
        fused=fused,
    )
    kd = dense(name, theirs[0], theirs[1], ids, logprobs, mass)
    ce = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].T, labels, reduction="sum")
    loss = (1 - kd_weight) * ce + kd_weight * kd
    assert out.kd.item() == pytest.approx(kd.item(), rel=1e-9, abs=1e-9)
    out.loss.backward()
    loss.backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine.grad - reference.grad).norm() <= 1e-9 * reference.grad.norm().clamp(min=1)


@pytest.mark.parametrize("mass", MASSES)
def test_which_ids_stand_where_nothing_does_is_all_the_same(mass):
    hidden, weight, labels, ids, logprobs = make(3, k=4)
    logprobs[:, 2:] = -torch.inf
    logprobs[0] = -torch.inf
    others = torch.stack([torch.cat((row[:2], torch.tensor([i for i in range(11) if i not in row][:2]))) for row in ids])
    found = []
    for names in (ids, others):
        h = hidden.clone().requires_grad_()
        out = sparse_soft_cross_entropy(
            h, weight, labels, names, logprobs, kd_weight=0.9, top_k_mass=mass, divergence="jensen_shannon"
        )
        out.loss.backward()
        found.append((out.loss.detach(), h.grad))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    alone = sparse_soft_cross_entropy(hidden[:1], weight, labels[:1], ids[:1], logprobs[:1], kd_weight=0.9, top_k_mass=mass)
    assert alone.kd == 0
    assert alone.loss == pytest.approx(0.1 * alone.ce)
