"""The samples that a report shows: which ones, their text token by token, and what student and teacher say of each token."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npd.errors import UserError
from npd.report.facts import RunFacts
from npd.report.reduce import spread
from npd.store import Store
from npd.store.files import opened

MOST_SAMPLES = 400
MOST_TOKENS = 120_000  # response tokens shown with their figures, over all samples
TOKENS_EACH = 4096  # of one response; what follows is shown as plain text
MOST_CHARACTERS = 400_000  # of a prompt, or of the plain rest of a response
MOST_TEXT = 8_000_000  # characters over all samples
MOST_PARTS = 16  # part files whose token columns are read
REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


class IdsOnly:
    """Where a run has no tokenizer: token ids in angle quotes."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"‹{i}›" for i in ids)


class Tokens:
    """A tokenizer.json, special tokens shown."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        with opened(path, "rb") as file:  # a pipe in its place would be waited for
            self.tokenizer = Tokenizer.from_str(file.read().decode())

    def decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i >= 0]
        return str(self.tokenizer.decode(known, skip_special_tokens=False))


def find_decoder(facts: RunFacts) -> Decoder:
    """The run's tokenizer, from its finished student or a snapshot; token ids where there is none."""
    store = Store(facts.path)
    for folder in [store.student, *(store.policy(v) for v in reversed(store.policies())), facts.path]:
        with suppress(Exception):  # whatever the file's reader raises
            return Tokens(folder / "tokenizer.json")
    facts.missing.append("No tokenizer.json was found in student/ or policy/: samples are shown as token ids.")
    return IdsOnly()


def pieces(ids: list[int], decoder: Decoder) -> list[str]:
    """The text of each token, so that all joined are the text of all.

    A token's text depends on those before it (word boundaries, bytes of one character): it is what decoding gains with it,
    beside the few tokens before. Of tokens that share a character, the last one has it and the others are empty.
    """
    out: list[str] = []
    start = read = 0  # decoded from `start`; what lies before `read` has been given out
    before = ""
    for i in range(len(ids)):
        text = decoder.decode(ids[start : i + 1])
        if text.endswith(REPLACEMENT) and i + 1 < len(ids) and i - read < 8:  # perhaps half of a character
            out.append("")
            continue
        out.append(text[len(before) :] if text.startswith(before) else text)
        start, read = read, i + 1
        before = decoder.decode(ids[start:read])
    return out


@dataclass(frozen=True)
class Gaps:
    """What both models say of a response's tokens; arrays [T]."""

    student: npt.NDArray[np.float64]
    """log p_S(y_t) under the snapshot that wrote it, at temperature 1."""
    teacher: npt.NDArray[np.float64]
    """log p_T(y_t) where the teacher's top-k has y_t, else the most that it can be."""
    bounded: npt.NDArray[np.bool_]
    """Is `teacher` only that bound?"""
    best: npt.NDArray[np.int64]
    """The teacher's first choice."""
    best_logprob: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]
    """Probability of the whole top-k."""

    @property
    def gap(self) -> npt.NDArray[np.float64]:
        """log p_S(y_t) - log p_T(y_t), nats: its mean over y ~ p_S is the KL of student to teacher; a lower bound where
        `bounded`."""
        return self.student - self.teacher


def token_gaps(response: list[int], behavior: list[float] | None, ids: list[int], logprobs: list[float]) -> Gaps | None:
    """Figures of a response's tokens from a part's columns; None where there is no teacher's top-k.

    A token outside of the top-k has at most the probability of the last of them, and at most what they leave over.
    """
    T = len(response)
    if not T or not ids or len(ids) % T:
        return None
    topk, logp = np.asarray(ids).reshape(T, -1), np.asarray(logprobs, np.float64).reshape(T, -1)
    hit = topk == np.asarray(response)[:, None]
    found = hit.any(axis=1)
    mass = np.exp(logp).sum(axis=1)
    with np.errstate(divide="ignore"):
        most = np.minimum(logp[:, -1], np.log(np.clip(1.0 - mass, 1e-12, 1.0)))
    teacher = np.where(found, np.where(hit, logp, 0.0).sum(axis=1), most)
    student = np.asarray(behavior, np.float64) if behavior is not None and len(behavior) == T else np.full(T, np.nan)
    return Gaps(student, teacher, ~found, topk[:, 0], logp[:, 0], mass)


@dataclass
class Browser:
    """What the page's browser of samples gets, and what was measured on the way."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    vocabulary: list[str] = field(default_factory=list)
    """Texts of the teacher's first choices; samples name them by number."""
    mass: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    """generation -> mean top-k mass, share of sampled tokens that are the teacher's first choice, tokens measured."""
    responses: int = 0
    """How many there are in all."""


def choose_parts(facts: RunFacts, most: int = MOST_PARTS) -> list[tuple[int, int]]:
    """(generation, part) to read: such that each stratum has one that holds it, rare ones first; then evenly spaced."""
    keys = strata(facts)
    generation, part = facts.column("generation"), facts.column("part")
    chosen: list[tuple[int, int]] = []
    counts = Counter(keys)
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        rows[key].append(i)
    for key, _ in sorted(counts.items(), key=lambda item: item[1]):
        here = Counter((int(generation[i]), int(part[i])) for i in rows[key])
        if len(chosen) < most and not here.keys() & set(chosen):
            chosen.append(here.most_common(1)[0][0])
    rest = sorted({(int(g), int(p)) for g, p in zip(generation, part, strict=True)} - set(chosen))
    if rest and len(chosen) < most:
        take = np.unique(np.linspace(0, len(rest) - 1, most - len(chosen)).round().astype(int))
        chosen += [rest[i] for i in take]
    return sorted(chosen)


def strata(facts: RunFacts) -> list[str]:
    """Generation, source and verdict of each response, as one key."""
    names = ("generation", "source", "verdict")
    columns = [facts.responses[name].to_pylist() for name in names] if facts.responses.num_rows else [[], [], []]
    return [f"{g}\0{source}\0{verdict}" for g, source, verdict in zip(*columns, strict=True)]


def browse(facts: RunFacts, most_samples: int = MOST_SAMPLES, most_tokens: int = MOST_TOKENS) -> Browser:
    """Choose samples from every generation, source and verdict, kept and dropped alike, and read their tokens."""
    browser = Browser(responses=facts.responses.num_rows)
    if not browser.responses:
        return browser
    decoder = find_decoder(facts)
    store = Store(facts.path)
    parts = choose_parts(facts)
    generation, part, row, tokens = (facts.column(n).astype(np.int64) for n in ("generation", "part", "row", "tokens"))
    inside = np.zeros(len(part), bool)
    for g, p in parts:
        inside |= (generation == g) & (part == p)
    candidates = np.flatnonzero(inside)
    keys = np.array(strata(facts), dtype=object)
    picked = candidates[spread(keys[candidates].astype(str), most_samples)]
    # Spread again in random order, so that a budget of tokens leaves out none of the strata.
    order = np.random.default_rng(0).permutation(picked)
    shown = np.minimum(tokens[order], TOKENS_EACH)
    chosen = set(order[(np.cumsum(shown) <= most_tokens) | (np.arange(len(order)) == 0)].tolist())
    numbers: dict[int, int] = {}
    measured: defaultdict[int, list[tuple[float, float, int]]] = defaultdict(list)
    for g, p in parts:
        try:
            table = store.read_part(g, p)
        except (UserError, FileNotFoundError):  # said already, or tidied away meanwhile
            continue
        if found := top_k_figures(table):
            measured[g].append(found)
        for i in sorted(i for i in chosen if generation[i] == g and part[i] == p):
            if row[i] < len(table):
                browser.samples.append(_sample(table.slice(int(row[i]), 1).to_pylist()[0], g, decoder, numbers))
    browser.samples = _within(browser.samples, MOST_TEXT)
    browser.vocabulary = [decoder.decode([i]) for i in numbers]
    for g, figures in measured.items():
        n = sum(count for *_, count in figures)
        browser.mass[g] = sum(m * c for m, _, c in figures) / n, sum(a * c for _, a, c in figures) / n, n
    return browser


def _within(samples: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """As many samples as have `most` characters in all, by chance; at least one."""
    sizes = np.array([len(s["prompt"]) + sum(map(len, s["pieces"])) + len(s["rest"]) for s in samples], np.int64)
    order = np.random.default_rng(0).permutation(len(samples))
    fit = (np.cumsum(sizes[order]) <= most) | (np.arange(len(order)) == 0)
    return [samples[i] for i in sorted(order[fit])]


def top_k_figures(table: pa.Table) -> tuple[float, float, int] | None:
    """Of a part: the mean probability of the teacher's top-k, the share of tokens that are its first choice, the tokens."""
    labels = table["response_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    ids = table["topk_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    logprobs = table["topk_logprobs"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not len(labels) or not len(ids) or len(ids) % len(labels) or len(ids) != len(logprobs):
        return None
    shape = (len(labels), -1)
    mass = np.exp(logprobs.astype(np.float64)).reshape(shape).sum(axis=1).mean()
    return float(mass), float((ids.reshape(shape)[:, 0] == labels).mean()), len(labels)


def _sample(row: dict[str, Any], generation: int, decoder: Decoder, numbers: dict[int, int]) -> dict[str, Any]:
    response = row["response_ids"] or []
    gaps = token_gaps(response, row["behavior_logprobs"], row["topk_ids"] or [], row["topk_logprobs"] or [])
    shown = response[:TOKENS_EACH]
    rest = decoder.decode(response[TOKENS_EACH:]) if len(response) > TOKENS_EACH else ""
    sample: dict[str, Any] = {
        "id": row["sample_id"],
        "g": generation,
        "source": row["source"] or "",
        "verdict": row["verdict"] or "",
        "finish": row["finish_reason"] or "",
        "n": len(response),
        "delta": _round(row["delta_ifd"]),
        "ifd": [_round(row["ifd_student"]), _round(row["ifd_teacher"])],
        "nll": [_round(row["student_nll"]), _round(row["teacher_nll"])],
        "prompt": _cut(decoder.decode(row["prompt_ids"] or [])),
        "pieces": pieces(shown, decoder),
        "rest": _cut(rest),
    }
    if gaps is not None:
        n = len(shown)
        # Hundredths of nats and percent as whole numbers: they compress best.
        sample |= {
            "student": _hundredths(gaps.student[:n]),
            "teacher": _hundredths(gaps.teacher[:n]),
            "bounded": "".join("01"[int(b)] for b in gaps.bounded[:n]),
            "best": [numbers.setdefault(int(i), len(numbers)) for i in gaps.best[:n]],
            "bestp": [round(100 * float(np.exp(p))) for p in gaps.best_logprob[:n]],
            "mass": _round(float(gaps.mass.mean())),
        }
    return sample


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … ({len(text) - MOST_CHARACTERS:,} more characters are in the part file)"


def _round(value: float | None) -> float | None:
    return float(f"{value:.4g}") if value is not None and np.isfinite(value) else None


def _hundredths(values: npt.NDArray[np.float64]) -> list[int | None]:
    return [round(100 * float(v)) if np.isfinite(v) else None for v in values]
