"""What every rule of selection has in common: verdicts, bounds, and the rule itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npd.config import SelectionConfig
from npd.errors import NpdError, RunError
from npd.records import DEGENERATE, DISCONNECT, PROXIMAL, UNDEFINED
from npd.registry import own_fault


class Bounds(NamedTuple):
    lower: float
    upper: float


class Judgement(NamedTuple):
    verdicts: npt.NDArray[np.str_]
    """[N]: PROXIMAL for what may be trained on, else why not, in a word (numpy cuts strings at the array's width)."""
    bounds: dict[str, Bounds] | None
    """Δ between which responses are kept, for every source in the part; None where the rule draws no bounds."""


class Rule(ABC):
    """A kind of `selection.rule`: which responses of a part may be trained on. It has no state."""

    reads_free: ClassVar[bool] = True
    """Does it read what follows from responses without their prompts (*_nll_free, ifd_*, delta_ifd)? Where it does not,
    those columns may be null."""
    bounds_of = "the rule's"
    """Whose bounds they are, in messages: "below the rule's lower bound"."""

    def check(self, config: SelectionConfig) -> None:
        """Do the options go together?

        Raises:
            ValueError: they do not; the message says which and why, in lower case and without a full stop.
        """

    @abstractmethod
    def __call__(self, table: pa.Table, config: SelectionConfig) -> Judgement:
        """Judge the N responses of a part.

        The same columns give the same judgement: the manifest's bounds are drawn anew from the finished part.

        Args:
            table: [N] a scored part with ifd_student, ifd_teacher and delta_ifd (float32, NaN where undefined). A rule may
                read its columns of one value each, and response_ids.
            config: the options.
        """

    def name_bounds(self, config: SelectionConfig, bounds: Bounds | None) -> tuple[str, str]:
        """What a message calls the lower and the upper bound.

        Args:
            config: the options.
            bounds: the lowest and the highest of a generation; None where its manifest has none.
        """
        lower, upper = f"{self.bounds_of} lower bound", f"{self.bounds_of} upper bound"
        if bounds is None:
            return lower, upper
        return f"{lower} ({bounds.lower:.3f} at the lowest)", f"{upper} ({bounds.upper:.3f} at the highest)"

    def note(self, config: SelectionConfig, responses: int) -> str | None:
        """What a user should know before a run whose parts have so many responses; None for nothing."""
        return None


def judge(rule: Rule, table: pa.Table, config: SelectionConfig) -> Judgement:
    """What a rule says of a part, seen to be a judgement of it.

    Raises:
        RunError: a plug-in's rule fails, or returns something else.
    """
    try:
        judgement = rule(table, config)
    except NpdError:
        raise
    except Exception as error:
        if type(rule).__module__.startswith("npd."):
            raise
        raise RunError(f"selection.rule {config.rule!r} fails {own_fault(error)}.", "Mend it there.") from error
    fault = _fault(judgement, table)
    if fault is not None:
        raise RunError(
            f"selection.rule {config.rule!r} must return npd.selection.Judgement(verdicts, bounds), but {fault}.",
            "Mend the plug-in.",
        )
    return judgement


def _fault(judgement: object, table: pa.Table) -> str | None:
    """What is wrong with what a rule returned for a part; None: nothing."""
    if not isinstance(judgement, Judgement):
        return f"it returned {type(judgement).__name__}"
    verdicts = np.asarray(judgement.verdicts)
    if verdicts.shape != (len(table),) or verdicts.dtype.kind != "U":
        return f"its verdicts are {verdicts.dtype} of shape {verdicts.shape}, not a word for each of {len(table)} responses"
    bounds = judgement.bounds
    if bounds is not None and not (isinstance(bounds, dict) and all(isinstance(b, Bounds) for b in bounds.values())):
        return "its bounds are not a dict of npd.selection.Bounds by source"
    return None


def bands(delta: npt.ArrayLike, lower: npt.ArrayLike, upper: npt.ArrayLike) -> npt.NDArray[np.str_]:
    """Verdict for each Δ: both edges of the band belong to "proximal"; a Δ that is not a number is "undefined".

    Bounds are numbers, or one for each Δ.
    """
    d = np.asarray(delta, np.float64)
    verdicts = np.full(d.shape, PROXIMAL, dtype="<U10")
    verdicts[d < np.asarray(lower, np.float64)] = DEGENERATE
    verdicts[d > np.asarray(upper, np.float64)] = DISCONNECT
    verdicts[np.isnan(d)] = UNDEFINED
    return verdicts
