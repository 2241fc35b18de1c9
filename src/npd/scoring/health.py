"""Whether what a teacher says can be true, and whether it still says what it said first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from npd.errors import RunError
from npd.scoring.prefill import AlignedReading, Reading
from npd.store.answers import wrong_ids, wrong_logprobs, wrong_top

QUESTIONS, TOKENS, BEST = 8, 16, 32
"""At most so many responses are kept to be asked again, so many tokens of each, so many of the best at each token."""
FEWEST = 8  # tokens: how far fewer are from each other says little
ONE_IN = 32  # responses of a part, for each that is kept
BOUND = 0.25
"""Nats by which answers may differ: kernels, batches and eight-bit weights make less than 0.1, another model makes more."""
EXACT = 5e-4  # nats: what rounding to four decimals makes
SAME, CERTAIN = 1e-6, 0.95  # nats, and a probability
LOWEST = -1e30  # below every log-probability, and a number
STORED = 5e-3  # nats: what storing as float16 makes, and kernels of another machine

Lists = Sequence[Sequence[int]]


def wrong_readings(readings: Sequence[Reading], lengths: Sequence[int], top_k: int, size: int) -> str | None:
    """What is wrong with readings of responses of these lengths, if anything.

    -inf is right where it is not the best, and where a teacher with another tokenizer has nothing to say.
    """
    if len(readings) != len(lengths):
        return f"{len(readings)} readings of {len(lengths)} responses"
    for i, (reading, length) in enumerate(zip(readings, lengths, strict=True)):
        shapes = (reading.logprobs.shape, reading.topk_ids.shape, reading.topk_logprobs.shape)
        if shapes != ((length,), (length, top_k), (length, top_k)):
            return f"log-probabilities of shapes {shapes} for {length} tokens and their top {top_k}"
        wrong = wrong_logprobs(reading.logprobs, finite=False) or wrong_ids(reading.topk_ids, size)
        said = _said(reading.topk_logprobs) if isinstance(reading, AlignedReading) else slice(None)
        wrong = wrong or wrong_top(reading.topk_ids[said], reading.topk_logprobs[said], finite=False)
        if wrong is not None:
            return f"{wrong} in response {i}"
    return None


class Difference(NamedTuple):
    """How far two answers to the same questions are apart."""

    nats: float
    """Mean over tokens of Σ p |log p - log q|, over the best of the first answer, p scaled to 1."""
    same_first: float
    """Share of tokens at which both rank the same token first."""
    mass: float
    """Mean probability of the first one's whole top-k."""
    mass_now: float


class Health:
    """Whether a teacher still answers a few questions as it did first.

    One that was restarted with other weights, or whose weights were damaged, may answer uniformly, or the same to everything,
    and nothing else would show it. The bound comes from the teacher itself, as some good ones are nearly uniform: how far its
    answers at one token are from those at another, and from each other when it is asked the same twice.

    Args:
        tokens: so many of each response are asked about again; None: all, where what follows changes how a token is read.
    """

    def __init__(self, tokens: int | None = TOKENS) -> None:
        self._tokens = tokens
        self._kept: tuple[list[list[int]], list[list[int]], Reading] | None = None
        self._between = self._repeated = 0.0
        self._part = ""

    @property
    def begun(self) -> bool:
        """Is there anything to compare with?"""
        return self._kept is not None

    def recall(self, part: str, contexts: Lists, responses: Lists, readings: Sequence[Reading], top_k: int) -> None:
        """Compare with what it said earlier, as the file `part` has it, instead of with what it will say first."""
        if all(reading.topk_ids.shape[1] == top_k for reading in readings):
            self._kept = self._keep(contexts, responses, readings)
            self._repeated, self._part = STORED, part

    def check(
        self,
        read: Callable[[Lists, Lists, int], list[Reading]],
        name: str,
        contexts: Lists,
        responses: Lists,
        readings: Sequence[Reading],
    ) -> None:
        """Ask again; what it answers first is kept, and asked again at once.

        Args:
            readings: what it has just said about `responses` behind `contexts`, with a top-k.

        Raises:
            RunError: it answers otherwise.
        """
        top_k = readings[0].topk_ids.shape[1] if readings else 0
        if not top_k:
            return
        first = self._kept is None
        if self._kept is None:
            self._check_varies(name, readings)
            self._kept = self._keep(contexts, responses, readings)
        kept_contexts, kept_responses, was = self._kept
        found = difference(was, _joined(read(kept_contexts, kept_responses, top_k)))
        if first:
            self._repeated = found.nats
        noise = 0.0 if first else self._repeated
        another = found.nats > max(BOUND, 5 * noise)
        # One that no longer looks at what it reads is as far from what it said there as from what it said elsewhere, however
        # little that is.
        blind = not first and found.nats > max(self._between / 2, 10 * noise, EXACT) and found.same_first < 0.5
        if another or blind:
            where = f" in {self._part}" if self._part else ""
            when = "asked the same twice" if first else f"asked again what it was asked first{where}"
            remedy = "Was its server restarted with other weights, another quantisation or another version? See to it"
            if self._part:
                remedy += ", or delete the run's generations if it was wrong then and is right now"
            raise RunError(
                f"The teacher {name} can't be trusted: {when}, {sum(map(len, kept_responses))} tokens, its log-probabilities "
                f"differ by {found.nats:.3g} nats a token (at the start {noise:.3g}; between one token and another "
                f"{self._between:.3g}), it ranks the same token first at {found.same_first:.0%} of them, and its top {top_k} "
                f"hold {found.mass_now:.3g} of all probability (before {found.mass:.3g}). What it read last is not kept.",
                f"{remedy}; then run the same command again.",
            )

    @staticmethod
    def _check_varies(name: str, readings: Sequence[Reading]) -> None:
        """See that not all tokens of a part are the same to it; of one that is certain that may be right: of repetitions."""
        logprobs_TK = _joined(readings).topk_logprobs
        logprobs_TK = logprobs_TK[_said(logprobs_TK)]
        if not len(logprobs_TK):
            return
        best = float(np.exp(logprobs_TK.max(axis=1)).mean())
        spread = float(np.ptp(np.maximum(logprobs_TK, LOWEST), axis=0).max())
        if len(logprobs_TK) >= FEWEST and best < CERTAIN and spread <= SAME:
            raise RunError(
                f"The teacher {name} says the same of everything that it reads: at all of {len(logprobs_TK)} tokens behind "
                f"{len(readings)} prompts the best has the probability {best:.3g}, and its top {logprobs_TK.shape[1]} "
                f"together {float(np.exp(logprobs_TK[0]).sum()):.3g}. Nothing of it is kept.",
                "See to its weights, or to its server; then run the same command again.",
            )

    def _keep(
        self, contexts: Lists, responses: Lists, readings: Sequence[Reading]
    ) -> tuple[list[list[int]], list[list[int]], Reading]:
        count = min(QUESTIONS, max(1, len(responses) // ONE_IN))
        rows = np.linspace(0, len(responses) - 1, count).astype(int).tolist()  # from all over the part
        kept = _joined([Reading(*(values[: self._tokens] for values in readings[i])) for i in rows])
        said = Reading(*(values[_said(kept.topk_logprobs)] for values in kept))
        n = len(said.topk_ids)
        others = [Reading(*(np.roll(values, by, axis=0) for values in said)) for by in (1, n // 2)]
        nats = [difference(said, other).nats for other in others] if n else [0.0]
        self._between = float(np.mean(nats)) if n >= FEWEST else 2 * BOUND
        return [list(contexts[i]) for i in rows], [list(responses[i][: self._tokens]) for i in rows], kept


def difference(was: Reading, now: Reading) -> Difference:
    """How far answers are from those that were given before to the same questions, where those said anything."""
    if not len(said := np.flatnonzero(_said(was.topk_logprobs))):
        return Difference(0.0, 1.0, 0.0, 0.0)
    was, now = (Reading(*(values[said] for values in reading)) for reading in (was, now))
    ids, before = was.topk_ids[:, :BEST], was.topk_logprobs[:, :BEST].astype(np.float64)
    after = now.topk_logprobs.astype(np.float64)
    found_TBK = ids[:, :, None] == now.topk_ids[:, None, :]
    # What is not among the best now is at most as likely as the last of them.
    missing = np.minimum(before, after.min(axis=1, initial=0.0, where=after > -np.inf, keepdims=True))
    theirs = np.where(found_TBK.any(axis=2), np.take_along_axis(after, found_TBK.argmax(axis=2), axis=1), missing)
    weights = np.exp(before)
    with np.errstate(invalid="ignore"):  # two times -inf
        apart = np.where(weights > 0, np.minimum(np.abs(before - theirs), 50.0), 0.0)
    nats = float(((weights * apart).sum(axis=1) / weights.sum(axis=1)).mean())
    same = float((was.topk_ids[:, 0] == now.topk_ids[:, 0]).mean())
    mass, mass_now = (float(np.exp(r.topk_logprobs.astype(np.float64)).sum(axis=1).mean()) for r in (was, now))
    return Difference(nats, same, mass, mass_now)


def _said(topk_logprobs: np.ndarray) -> np.ndarray:
    """[T]: is there anything in the top-k?"""
    return np.asarray((topk_logprobs > -np.inf).any(axis=1))


def _joined(readings: Sequence[Reading]) -> Reading:
    return Reading(*(np.concatenate(columns) for columns in zip(*readings, strict=True)))
