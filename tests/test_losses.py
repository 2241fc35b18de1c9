"""The loss against a slow, dense reference that shares no line with it."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from npd.losses import TopKMass, near_policy_kl, sparse_soft_cross_entropy
from npd.models import AfterHead

T, D, V = 9, 6, 11
MASSES: tuple[TopKMass, ...] = ("raw", "renormalize", "tail")


def dense(hidden, weight, labels, ids, logprobs, kd_weight, mass):
    """METHOD's formula token by token, in float64, with autograd's gradients."""
    z = hidden @ weight.T
    log_s = torch.log_softmax(z, -1)
    ce = z.new_zeros(())
    kd = z.new_zeros(())
    for t in range(len(labels)):
        ce = ce - log_s[t, labels[t]]
        p = [float(value) for value in logprobs[t].double().exp()]
        if mass == "renormalize":
            p = [value / sum(p) for value in p]
        for token, p_teacher in zip(ids[t].tolist(), p, strict=True):
            if p_teacher > 0:
                kd = kd + p_teacher * (torch.tensor(p_teacher, dtype=z.dtype).log() - log_s[t, token])
        given = [token for token, p_teacher in zip(ids[t].tolist(), p, strict=True) if p_teacher > 0]
        others = [v for v in range(z.shape[1]) if v not in given]  # what has no entry belongs to the rest
        rest = 1.0 - sum(p)
        if mass == "tail" and others and rest > 0:
            kd = kd + rest * (torch.tensor(rest, dtype=z.dtype).log() - torch.logsumexp(log_s[t, others], 0))
    loss = (1 - kd_weight) * ce + kd_weight * kd
    return loss, ce, kd, log_s[torch.arange(len(labels)), labels]


def make(k, seed=0, tokens=T, width=D, vocabulary=V, scale=1.0, full=False):
    """Inputs in float64; the teacher's top-k come from a distribution of its own, best first."""
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    teacher = torch.log_softmax(2 * torch.randn(tokens, vocabulary, generator=g, dtype=torch.float64), -1)
    logprobs, ids = teacher.topk(k, dim=-1)
    labels = torch.randint(vocabulary, (tokens,), generator=g)
    if k:
        labels[0] = ids[0, -1]  # inside the top-k
    if 0 < k < vocabulary:
        labels[1] = next(v for v in range(vocabulary) if v not in ids[1].tolist())  # outside it
    return hidden, weight, labels, ids, logprobs


def relative(actual, expected, floor=1e-30):
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm().clamp(min=floor))


def compare(inputs, kd_weight, mass, chunk, dtype, tolerance, upstream=1.0, floor=1e-30, **options):
    hidden, weight, labels, ids, logprobs = inputs
    # The reference starts from what the loss is given, so that rounding the input is not counted as its error.
    hidden, weight, logprobs = hidden.to(dtype), weight.to(dtype), logprobs.to(dtype)
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs = hidden.double().clone().requires_grad_(), weight.double().clone().requires_grad_()
    scale = options.get("scale", 1.0)
    out = sparse_soft_cross_entropy(
        *ours, labels, ids, logprobs, kd_weight=kd_weight, top_k_mass=mass, chunk_tokens=chunk, **options
    )
    expected = dense(*theirs, labels, ids, logprobs, kd_weight, mass)
    expected = (expected[0] * scale, *expected[1:])
    assert out.loss.dtype == dtype
    for name, value in zip(("loss", "ce", "kd", "label_logprobs"), expected, strict=True):
        assert relative(getattr(out, name), value, floor) <= tolerance, name
    (out.loss * upstream).backward()
    (expected[0] * upstream).backward()
    for name, mine, reference in zip(("hidden", "weight"), ours, theirs, strict=True):
        assert mine.grad.dtype == dtype
        assert relative(mine.grad, reference.grad, floor) <= tolerance, f"gradient of {name}"


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("kd_weight", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("k", range(1, V + 1))
def test_equals_dense_reference_float64(k, kd_weight, mass):
    for chunk in (1, 3, 7, T + 5, None):
        compare(make(k, seed=k), kd_weight, mass, chunk, torch.float64, 1e-10)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("kd_weight", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("k", range(1, V + 1))
def test_equals_dense_reference_float32(k, kd_weight, mass):
    for chunk in (1, 3, 7, T + 5, None):
        compare(make(k, seed=k), kd_weight, mass, chunk, torch.float32, 1e-5)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("kd_weight", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_two_sweeps_it_is_the_same(dtype, kd_weight, mass):
    """What a GPU computes, here on a CPU."""
    for k in (1, 4, V - 1, V):
        for chunk in (3, None):
            tolerance = 1e-10 if dtype == torch.float64 else 1e-5
            compare(make(k, seed=k), kd_weight, mass, chunk, dtype, tolerance, fused=True, scale=0.37)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mass", MASSES)
def test_a_scale_is_not_rounded_to_the_type_of_the_hidden_states(fused, mass):
    """1 / 1,021 is 0.3% off in bfloat16; what is left is the rounding of each entry, which has no direction."""
    inputs = make(4, tokens=200, width=64, vocabulary=50, scale=0.3)
    hidden, weight, *targets = (t.bfloat16() if i < 2 else t for i, t in enumerate(inputs))
    found = []
    for scale in (1 / 1021, 1.0):
        mine, head = hidden.clone().requires_grad_(), weight.float().requires_grad_()
        options = {"kd_weight": 0.9, "top_k_mass": mass, "scale": scale, "fused": fused}
        sparse_soft_cross_entropy(mine, head, targets[0], targets[1], targets[2].float(), **options).loss.backward()
        found.append((mine.grad.double(), head.grad.double()))
    for scaled, plain in zip(*found, strict=True):
        ratio = float((scaled * plain).sum() / plain.square().sum()) * 1021
        assert ratio == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_hidden_states_in_bfloat16_are_as_near_as_their_rounding(fused):
    inputs = make(10, tokens=64, width=32, vocabulary=200, scale=0.3)
    hidden, weight, *targets = (t.bfloat16() if i < 2 else t for i, t in enumerate(inputs))
    mine, head = hidden.clone().requires_grad_(), weight.float().requires_grad_()
    theirs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    sparse_soft_cross_entropy(mine, head, *targets, kd_weight=0.9, fused=fused, chunk_tokens=24).loss.backward()
    dense(*theirs, targets[0], targets[1], targets[2], 0.9, "raw")[0].backward()
    assert relative(mine.grad, theirs[0].grad) < 1e-2
    assert relative(head.grad, theirs[1].grad) < 1e-2


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("upstream", [0.125, -3.0])
def test_upstream_gradient(mass, upstream):
    compare(make(4), 0.9, mass, 3, torch.float64, 1e-10, upstream)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 12),
    vocabulary=st.integers(2, 17),
    share=st.floats(0, 1),
    kd_weight=st.floats(0, 1),
    mass=st.sampled_from(MASSES),
    chunk=st.integers(1, 15),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
)
def test_equals_dense_reference_anywhere(seed, tokens, vocabulary, share, kd_weight, mass, chunk, scale):
    k = max(1, min(vocabulary, round(1 + share * (vocabulary - 1))))
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, 5, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, 5, generator=g, dtype=torch.float64)
    teacher = torch.log_softmax(torch.randn(tokens, vocabulary, generator=g, dtype=torch.float64), -1)
    logprobs, ids = teacher.topk(k, dim=-1)
    labels = torch.randint(vocabulary, (tokens,), generator=g)
    # Absolute where the exact value is all but zero: a logit's own rounding is what is left there.
    compare((hidden, weight, labels, ids, logprobs), kd_weight, mass, chunk, torch.float64, 1e-11, floor=1.0)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_teacher_probability_of_zero(mass, dtype):
    hidden, weight, labels, ids, logprobs = make(5)
    logprobs[:, 3:] = -torch.inf
    logprobs[2] = torch.tensor([0.0] + [-torch.inf] * 4)  # all of the teacher's mass on one token
    compare((hidden, weight, labels, ids, logprobs), 0.9, mass, 4, dtype, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("mass", MASSES)
def test_student_probability_that_underflows(mass):
    """A student that gives a token nothing still gets a finite loss and its gradient."""
    hidden, weight, labels, ids, logprobs = make(4, scale=200.0)
    compare((hidden, weight, labels, ids, logprobs), 0.9, mass, 4, torch.float64, 1e-10)
    compare((hidden, weight, labels, ids, logprobs), 0.9, mass, 4, torch.float32, 1e-5)
    hidden32, weight32 = hidden.float().requires_grad_(), weight.float().requires_grad_()
    out = sparse_soft_cross_entropy(hidden32, weight32, labels, ids, logprobs.float(), kd_weight=0.9, top_k_mass=mass)
    out.loss.backward()
    assert all(torch.isfinite(x).all() for x in (out.loss, hidden32.grad, weight32.grad))


@pytest.mark.parametrize("mass", MASSES)
def test_teacher_equal_to_student_has_no_kd_gradient(mass):
    """At K = V and p_T = p_S the divergence is 0 and so is its gradient."""
    hidden, weight, labels, _, _ = make(1)
    logprobs, ids = torch.log_softmax(hidden @ weight.T, -1).topk(V)
    hidden.requires_grad_()
    out = sparse_soft_cross_entropy(hidden, weight, labels, ids, logprobs, kd_weight=1.0, top_k_mass=mass)
    out.loss.backward()
    assert abs(float(out.kd)) < 1e-12
    assert hidden.grad.abs().max() < 1e-12


def test_raw_keeps_the_teachers_mass_and_the_options_differ():
    inputs = make(3)
    kd = {m: float(sparse_soft_cross_entropy(*inputs, kd_weight=1.0, top_k_mass=m).kd) for m in MASSES}
    assert len({round(value, 6) for value in kd.values()}) == 3
    # The tail's own term is what separates raw from tail, and a KL of two whole distributions is never negative.
    assert kd["tail"] >= 0
    assert kd["renormalize"] >= 0


def test_sft_needs_no_teacher():
    hidden, weight, labels, _, _ = make(1)
    hidden.requires_grad_()
    none = torch.empty(T, 0)
    out = sparse_soft_cross_entropy(hidden, weight, labels, none.long(), none, kd_weight=0.0)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert relative(out.loss, expected) < 1e-12
    (grad,) = torch.autograd.grad(expected, hidden)
    out.loss.backward()
    assert relative(hidden.grad, grad) < 1e-12
    assert float(out.kd) == 0


@pytest.mark.parametrize("mass", MASSES)
def test_gradcheck(mass):
    hidden, weight, labels, ids, logprobs = make(3, tokens=4, width=3, vocabulary=6)

    def loss(h, w):
        return sparse_soft_cross_entropy(h, w, labels, ids, logprobs, kd_weight=0.7, top_k_mass=mass, chunk_tokens=3).loss

    assert gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_gets_no_gradient_and_the_other_the_same(frozen):
    inputs = make(4)
    both = [x.clone().requires_grad_() for x in inputs[:2]]
    sparse_soft_cross_entropy(*both, *inputs[2:], kd_weight=0.9).loss.backward()
    one = [x.clone().requires_grad_(name != frozen) for x, name in zip(inputs[:2], ("hidden", "weight"), strict=True)]
    sparse_soft_cross_entropy(*one, *inputs[2:], kd_weight=0.9).loss.backward()
    for mine, reference, name in zip(one, both, ("hidden", "weight"), strict=True):
        if name == frozen:
            assert mine.grad is None
        else:
            assert torch.equal(mine.grad, reference.grad)


def test_only_the_loss_carries_a_gradient():
    hidden, *rest = make(4)
    out = sparse_soft_cross_entropy(hidden.requires_grad_(), *rest, kd_weight=0.9)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.ce, out.kd, out.label_logprobs))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_of_a_model(tied, teacher_dir):
    """With a tied head the embedding's gradient is the sum of its two uses."""
    config = LlamaConfig.from_pretrained(teacher_dir)
    config.tie_word_embeddings = tied
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).double()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.tensor([[1, 5, 9, 17, 4, 8, 6]])
    labels = ids[0, 3:]
    logprobs, topk_ids = torch.log_softmax(torch.randn(4, 20, dtype=torch.float64), -1).topk(5)

    def gradients(loss_of_hidden):
        model.zero_grad()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, 2:6]
        loss_of_hidden(hidden).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients(
        lambda h: (
            sparse_soft_cross_entropy(h, model.lm_head.weight, labels, topk_ids, logprobs, kd_weight=0.9, chunk_tokens=3).loss
        )
    )
    theirs = gradients(lambda h: dense(h, model.lm_head.weight, labels, topk_ids, logprobs, 0.9, "raw")[0])
    assert ours.keys() == theirs.keys()
    assert ("lm_head.weight" in ours) != tied
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) <= 1e-10, name


def test_bfloat16_head_and_narrow_teacher():
    """Half-precision inputs, as under autocast, give float32 sums close to the exact ones; gradients keep their types."""
    hidden, weight, labels, ids, logprobs = make(4, tokens=40)
    mine = hidden.bfloat16().requires_grad_(), weight.float().requires_grad_()
    out = sparse_soft_cross_entropy(*mine, labels, ids.int(), logprobs.half(), kd_weight=0.9, chunk_tokens=16)
    expected = dense(hidden, weight, labels, ids, logprobs, 0.9, "raw")
    assert out.loss.dtype == out.label_logprobs.dtype == torch.float32
    assert relative(out.loss, expected[0]) < 2e-2
    out.loss.backward()
    assert mine[0].grad.dtype == torch.bfloat16
    assert mine[1].grad.dtype == torch.float32


def test_int32_labels_as_the_store_holds_them():
    hidden, weight, labels, ids, logprobs = make(4)
    wide = sparse_soft_cross_entropy(hidden, weight, labels, ids, logprobs, kd_weight=0.9)
    narrow = sparse_soft_cross_entropy(hidden, weight, labels.int(), ids.int(), logprobs, kd_weight=0.9)
    assert torch.equal(wide.loss, narrow.loss)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"weight": torch.zeros(V, D + 1)}, {}, r"shapes do not fit.*weight \(11, 7\)"),
        ({"labels": torch.zeros(T + 1).long()}, {}, r"shapes do not fit.*labels \(10,\)"),
        ({"labels": torch.zeros(T, 1).long()}, {}, "shapes do not fit"),
        ({"topk_ids": torch.zeros(T, 3).long()}, {}, "shapes do not fit"),
        ({"topk_ids": torch.zeros(T - 1, 4).long(), "topk_logprobs": torch.zeros(T - 1, 4)}, {}, "shapes do not fit"),
        ({"topk_ids": torch.zeros(T).long(), "topk_logprobs": torch.zeros(T)}, {}, "shapes do not fit"),
        ({"weight": torch.zeros(D)}, {}, "shapes do not fit"),
        ({"hidden": torch.zeros(1, T, D)}, {}, "shapes do not fit"),
        ({}, {"kd_weight": -0.1}, "kd_weight must lie in 0..1, but it is -0.1"),
        ({}, {"kd_weight": 1.1}, "kd_weight must lie in 0..1"),
        ({}, {"kd_weight": float("nan")}, "kd_weight must lie in 0..1"),
        ({}, {"top_k_mass": "rest"}, "raw, renormalize or tail, but it is 'rest'"),
        ({}, {"chunk_tokens": 0}, "chunk_tokens must be at least 1, but it is 0"),
        ({}, {"chunk_tokens": -1}, "chunk_tokens must be at least 1, but it is -1"),
        ({"topk_ids": torch.zeros(T, 0).long(), "topk_logprobs": torch.zeros(T, 0)}, {}, "no teacher log-probabilities"),
    ],
)
def test_bad_input(change, options, message):
    names = ("hidden", "weight", "labels", "topk_ids", "topk_logprobs")
    inputs = dict(zip(names, make(4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        sparse_soft_cross_entropy(**inputs, **({"kd_weight": 0.9} | options))


def test_no_tokens():
    hidden, weight, labels, ids, logprobs = make(4)
    hidden, weight = hidden[:0].requires_grad_(), weight.requires_grad_()
    out = sparse_soft_cross_entropy(hidden, weight, labels[:0], ids[:0], logprobs[:0], kd_weight=0.9)
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.label_logprobs.shape == (0,)
    assert not weight.grad.any()


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("mass", MASSES)
def test_no_tensor_grows_with_tokens_times_vocabulary(mass):
    tokens, width, vocabulary, chunk = 640, 8, 300, 5
    hidden, weight, labels, ids, logprobs = make(4, tokens=tokens, width=width, vocabulary=vocabulary)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with _Largest() as seen:
        sparse_soft_cross_entropy(
            hidden, weight, labels, ids, logprobs.float(), kd_weight=0.9, top_k_mass=mass, chunk_tokens=chunk
        ).loss.backward()
    assert hidden.grad is not None
    assert 0 < seen.elements <= max(chunk * vocabulary, vocabulary * width, tokens * width)


def _peak_bytes(tokens, vocabulary, width=4):
    """Most bytes alive at once above the inputs, forward and backward, as torch's allocator counts them."""
    hidden, weight, labels, ids, logprobs = make(4, tokens=tokens, width=width, vocabulary=vocabulary)
    hidden, weight, logprobs = hidden.float().requires_grad_(), weight.float().requires_grad_(), logprobs.float()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sparse_soft_cross_entropy(hidden, weight, labels, ids, logprobs, kd_weight=0.9, chunk_tokens=8).loss.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def test_peak_memory_is_independent_of_tokens_times_vocabulary():
    few, many = _peak_bytes(64, 2000), _peak_bytes(1024, 2000)
    # Logits of 960 tokens more would take 7.7 MB; hidden gradients, labels' log-probabilities and the like are 100 kB.
    assert few > 4 * 8 * 2000
    assert many - few < 4 * 960 * 4 * 20
    assert many < 4 * 1024 * 2000 / 4


@pytest.mark.parametrize("mass", MASSES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.1, 12))
def test_float16_log_probabilities_as_they_are_stored(mass, seed, sharpness):
    """Rounded to 11 bits they move the loss by less than a thousandth of a nat per token, the gradient as little."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(24, 6, generator=g).double(), torch.randn(40, 6, generator=g).double()
    labels = torch.randint(40, (24,), generator=g)
    logprobs, ids = (sharpness * torch.randn(24, 40, generator=g).double()).log_softmax(-1).topk(10)
    results = []
    for stored in (logprobs, logprobs.half()):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = sparse_soft_cross_entropy(h, w, labels, ids, stored, kd_weight=0.9, top_k_mass=mass).loss / 24
        results.append((loss, *torch.autograd.grad(loss, (h, w))))
    exact, rounded = results
    assert abs(float((rounded[0] - exact[0]).detach())) < 1e-3 * max(1.0, float(exact[0].detach()))
    for a, b in zip(exact[1:], rounded[1:], strict=True):
        assert (a - b).norm() <= 2e-3 * a.norm() + 1e-6


def test_the_heads_gradient_is_in_memory_once():
    assert _peak_bytes(16, 2000, width=256) < 1.4 * 4 * 2000 * 256


def test_backward_again_where_the_graph_is_kept():
    hidden, weight, labels, ids, logprobs = make(4)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = sparse_soft_cross_entropy(hidden, weight, labels, ids, logprobs, kd_weight=0.9).loss * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    last = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(first, again, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_near_policy_kl_is_exact_in_expectation():
    g = torch.Generator().manual_seed(5)
    for spread in (0.0, 0.1, 1.0, 5.0):
        base = torch.randn(50, generator=g, dtype=torch.float64)
        log_gen = torch.log_softmax(base, 0)
        log_cur = torch.log_softmax(base + spread * torch.randn(50, generator=g, dtype=torch.float64), 0)
        terms = near_policy_kl(log_cur, log_gen)
        exact = (log_cur.exp() * (log_cur - log_gen)).sum()
        assert (terms >= -1e-15).all()
        assert float((log_gen.exp() * terms).sum()) == pytest.approx(float(exact), rel=1e-12, abs=1e-15)


@given(a=st.floats(-30, 0), b=st.floats(-30, 0))
def test_near_policy_kl_is_never_negative(a, b):
    value = float(near_policy_kl(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)))
    assert value >= -1e-12
    if abs(a - b) > 1e-3:
        assert value > 0


# -- what a model does after its head


def through_head(hidden, weight, bias, after, labels, ids, logprobs, kd_weight, mass):
    """Plain autograd over the whole vocabulary; `dense` on logits that are already there."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * after.scale
    if after.soft_cap is not None:
        z = after.soft_cap * torch.tanh(z / after.soft_cap)
    return dense(z, torch.eye(z.shape[1], dtype=z.dtype), labels, ids, logprobs, kd_weight, mass)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(2, 7),
    vocabulary=st.integers(2, 13),
    share=st.floats(0, 1),
    kd_weight=st.sampled_from([0.0, 0.9, 1.0]),
    mass=st.sampled_from(MASSES),
    chunk=st.integers(1, 8),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 0.0625, 3.0]),
    soft_cap=st.sampled_from([None, 1.5, 30.0]),
    fused=st.booleans(),
)
def test_bias_scale_and_soft_cap(seed, tokens, vocabulary, share, kd_weight, mass, chunk, biased, scale, soft_cap, fused):
    inputs = make(round(1 + share * (vocabulary - 1)), seed, tokens, vocabulary=vocabulary, scale=2.0)
    after = AfterHead(scale, soft_cap)
    bias = torch.linspace(-1, 2, vocabulary, dtype=torch.float64) if biased else None
    ours, theirs = ([x.clone().requires_grad_() for x in (*inputs[:2], bias) if x is not None] for _ in range(2))
    out = sparse_soft_cross_entropy(
        *ours[:2],
        *inputs[2:],
        kd_weight=kd_weight,
        top_k_mass=mass,
        bias=ours[2] if biased else None,
        after_head=after,
        chunk_tokens=chunk,
        fused=fused,
    )
    labels, ids, logprobs = inputs[2:]
    expected = through_head(
        theirs[0], theirs[1], theirs[2] if biased else None, after, labels, ids, logprobs, kd_weight=kd_weight, mass=mass
    )
    for name, value in zip(("loss", "ce", "kd", "label_logprobs"), expected, strict=True):
        assert relative(getattr(out, name), value, 1e-3) <= 1e-9, name
    (2 * out.loss).backward()
    (2 * expected[0]).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert relative(mine.grad, reference.grad, 1e-3) <= 1e-9


def test_nothing_after_the_head_changes_no_bit():
    inputs = [x.float() if x.is_floating_point() else x for x in make(3)]
    plain, same = (sparse_soft_cross_entropy(*inputs, kd_weight=0.9, after_head=after) for after in (None, AfterHead()))
    assert torch.equal(plain.loss, same.loss)
    assert torch.equal(plain.label_logprobs, same.label_logprobs)


def test_a_bias_of_another_size_is_refused():
    with pytest.raises(ValueError, match="shapes do not fit"):
        sparse_soft_cross_entropy(*make(3), kd_weight=0.9, bias=torch.zeros(V + 1))
