from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
from fake_run import HOSTILE, make_run
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from npd.report.facts import gather
from npd.report.samples import browse, choose_parts, pieces, strata, token_gaps
from npd.report.text import island, plot_text, visible
from npd.store import Store


class Bytes:
    """A byte-level tokenizer of 256 tokens: most characters take several."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


BYTES = Bytes()
anything = st.text(st.characters(codec="utf-8"), max_size=60)


@given(anything)
def test_pieces_join_to_the_whole(text):
    ids = BYTES.encode(text)
    out = pieces(ids, BYTES)
    assert len(out) == len(ids)
    assert "".join(out) == BYTES.decode(ids) == text


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_of_broken_characters_are_there_too(ids):
    out = pieces(ids, BYTES)
    assert len(out) == len(ids)
    assert set("".join(out)) == set(BYTES.decode(ids))


@given(st.text(st.characters(), max_size=80) | st.sampled_from(HOSTILE))
def test_visible_text_hides_nothing_and_can_be_written(text):
    out = visible(text)
    out.encode("utf-8")
    back = re.sub(r"⟨U\+([0-9A-F]{4})⟩", lambda m: chr(int(m[1], 16)), out)
    if "⟨U+" not in text:
        assert back == text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u2028\u2029]", out)
    assert not any(0xD800 <= ord(c) < 0xE000 for c in out)


@given(st.recursive(st.text(st.characters()) | st.sampled_from(HOSTILE) | st.integers() | st.none(), st.lists, max_leaves=8))
def test_an_island_is_json_without_markup(value):
    text = island(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set(text) & set("<>&")


@given(st.text(st.characters(), max_size=50) | st.sampled_from(HOSTILE))
def test_labels_of_plots_have_no_markup(text):
    out = plot_text(text)
    assert not set(out) & set("<>")
    said, clean = html.unescape(out), visible(" ".join(text.split()))
    assert said == clean if len(clean) <= 60 else said == f"{clean[:59]}…"


@given(st.integers(1, 6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_gaps_by_hand(T, k, random):
    """Token by token with dictionaries, against the vectorised ones."""
    response = [random.randrange(6) for _ in range(T)]
    behavior = [-random.random() * 3 for _ in range(T)]
    ids, logprobs = [], []
    for _ in range(T):
        probabilities = sorted((0.01 + random.random() for _ in range(k + 1)), reverse=True)
        total = sum(probabilities)
        ids += random.sample(range(6), k)
        logprobs += [float(np.log(p / total)) for p in probabilities[:k]]
    gaps = token_gaps(response, behavior, ids, logprobs)
    assert gaps is not None
    for t in range(T):
        known = dict(zip(ids[t * k : t * k + k], logprobs[t * k : t * k + k], strict=True))
        mass = sum(np.exp(v) for v in known.values())
        if response[t] in known:
            assert not gaps.bounded[t]
            assert gaps.gap[t] == pytest.approx(behavior[t] - known[response[t]])
        else:
            most = min(min(known.values()), np.log(max(1 - mass, 1e-12)))
            assert gaps.bounded[t]
            assert gaps.gap[t] == pytest.approx(behavior[t] - most)
        assert gaps.mass[t] == pytest.approx(mass)
        assert gaps.best[t] == ids[t * k]


def test_without_a_teacher_there_are_no_gaps():
    assert token_gaps([1, 2], [-0.1, -0.2], [], []) is None
    assert token_gaps([], None, [], []) is None
    gaps = token_gaps([1], None, [1, 2], [-0.1, -3.0])  # a reference: no snapshot wrote it
    assert gaps is not None
    assert np.isnan(gaps.gap).all()


def test_mean_gap_is_the_difference_of_the_likelihoods(tmp_path, teacher_dir, student_dir, data_file):
    """Of a real part, where the top-k are the whole vocabulary: mean gap = teacher_nll - student_nll."""
    import npd

    tree = {
        "run_dir": str(tmp_path / "run"),
        "student": {"model": str(student_dir)},
        "teacher": {"model": str(teacher_dir)},
        "data": {"train": str(data_file), "max_prompt_tokens": 32},
        "rollout": {"max_new_tokens": 12, "part_size": 12},
        "scoring": {"top_k": 20},
        "packing": {"length": 64},
        "tracking": {"trackers": []},
    }
    npd.refresh(tree)
    table = Store(tmp_path / "run").read_part(0, 0)
    for row in table.to_pylist():
        gaps = token_gaps(row["response_ids"], row["behavior_logprobs"], row["topk_ids"], row["topk_logprobs"])
        assert gaps is not None
        assert not gaps.bounded.any()
        # The teacher's log-probabilities are kept as float16.
        assert gaps.gap.mean() == pytest.approx(row["teacher_nll"] - row["student_nll"], abs=5e-3)
    assert (tmp_path / "run/report.html").exists()  # `npd refresh` writes it too


def test_every_stratum_is_shown(tmp_path):
    facts = gather(make_run(tmp_path / "run"))
    shown = browse(facts)
    assert len(shown.samples) == shown.responses == 80
    few = browse(facts, most_samples=12)
    keys = strata(facts)
    by_id = dict(zip(facts.responses["sample_id"].to_pylist(), keys, strict=True))
    assert len({by_id[s["id"]] for s in few.samples}) == min(12, len(set(keys)))
    assert len(choose_parts(facts, 1)) == 1
    assert sum(s["n"] for s in browse(facts, most_tokens=50).samples) <= 50


def test_text_has_a_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("npd.report.samples.MOST_TEXT", 300)
    samples = browse(gather(make_run(tmp_path / "run"))).samples
    assert 1 <= len(samples) < 80
    assert sum(len(s["prompt"]) + len("".join(s["pieces"])) for s in samples) <= 300


def test_samples_say_what_the_parts_say(tmp_path):
    words = [*HOSTILE, "x" * 100_000]
    path = make_run(tmp_path / "run", words=words)
    shown = browse(gather(path))
    rows: dict[str, dict] = {}
    for g in (0, 1):
        for part in (0, 1):
            rows |= {row["sample_id"]: row for row in Store(path).read_part(g, part).to_pylist()}
    assert len(shown.samples) == len(rows)
    for sample in json.loads(island(shown.samples)):
        row = rows[sample["id"]]
        assert sample["verdict"] == row["verdict"]
        assert sample["delta"] == pytest.approx(row["delta_ifd"], rel=1e-3)
        assert [p.strip() for p in sample["pieces"]] == [words[i].strip() for i in row["response_ids"]]
        assert np.array(sample["student"]) / 100 == pytest.approx(row["behavior_logprobs"], abs=0.0051)
        assert [shown.vocabulary[b] for b in sample["best"]] == [words[i] for i in row["topk_ids"][::3]]


def test_top_k_mass_and_agreement(tmp_path):
    path = make_run(tmp_path / "run")
    shown = browse(gather(path))
    for g in (0, 1):
        masses, agreed = [], []
        for part in (0, 1):
            for row in Store(path).read_part(g, part).to_pylist():
                for t, token in enumerate(row["response_ids"]):
                    masses.append(sum(np.exp(v) for v in row["topk_logprobs"][3 * t : 3 * t + 3]))
                    agreed.append(row["topk_ids"][3 * t] == token)
        assert shown.mass[g] == pytest.approx((np.mean(masses), np.mean(agreed), len(masses)))
