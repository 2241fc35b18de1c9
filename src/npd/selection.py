"""Δ-IFD: which of the student's responses may be trained on.

Instruction-Following Difficulty is from Li et al., arXiv:2308.12032; its perplexity form from Superfiltering,
arXiv:2402.00530; the difference of teacher and student and its bands from Near-Policy Distillation, arXiv:2605.05940.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npd.config import SelectionConfig
from npd.errors import RunError

Floats = npt.NDArray[np.float64]

PROXIMAL, DEGENERATE, DISCONNECT, UNDEFINED = "proximal", "degenerate", "disconnect", "undefined"
KEPT = (PROXIMAL, "reference")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def instruction_following_difficulty(
    nll: npt.ArrayLike, nll_free: npt.ArrayLike, *, ifd: Literal["loss_ratio", "perplexity_ratio"] = "loss_ratio"
) -> Floats:
    """IFD of N responses from their mean nats per token with the prompt (`nll`) and without (`nll_free`).

    loss_ratio is nll / nll_free; perplexity_ratio is exp(nll - nll_free). Where nll_free is 0 the ratio is undefined:
    NaN or infinite, as IEEE has it.
    """
    s, s_free = np.asarray(nll, np.float64), np.asarray(nll_free, np.float64)
    with np.errstate(all="ignore"):
        return s / s_free if ifd == "loss_ratio" else np.exp(s - s_free)


def delta_ifd(
    student_nll: npt.ArrayLike,
    student_nll_free: npt.ArrayLike,
    teacher_nll: npt.ArrayLike,
    teacher_nll_free: npt.ArrayLike,
    *,
    ifd: Literal["loss_ratio", "perplexity_ratio"] = "loss_ratio",
) -> Floats:
    """IFD_teacher - IFD_student for N responses; arguments [N] are mean nats per response token."""
    with np.errstate(all="ignore"):
        return instruction_following_difficulty(teacher_nll, teacher_nll_free, ifd=ifd) - instruction_following_difficulty(
            student_nll, student_nll_free, ifd=ifd
        )


def bands(delta: npt.ArrayLike, lower: float, upper: float) -> npt.NDArray[np.str_]:
    """Verdict for each Δ: both edges of the band belong to "proximal"; a Δ that is not a number is "undefined"."""
    d = np.asarray(delta, np.float64)
    verdicts = np.full(d.shape, PROXIMAL, dtype="<U10")
    verdicts[d < lower] = DEGENERATE
    verdicts[d > upper] = DISCONNECT
    verdicts[np.isnan(d)] = UNDEFINED
    return verdicts


class Select:
    """Stage: adds ifd_student, ifd_teacher, delta_ifd and verdict to a scored table."""

    def __init__(self, config: SelectionConfig) -> None:
        self.config = config

    def __call__(self, table: pa.Table) -> pa.Table:
        student, teacher = (
            instruction_following_difficulty(
                table[f"{who}_nll"].to_numpy(), table[f"{who}_nll_free"].to_numpy(), ifd=self.config.ifd
            )
            for who in ("student", "teacher")
        )
        with np.errstate(all="ignore"):
            # Rounded before it is judged, so that the verdict can be recomputed from the stored column.
            delta = (teacher - student).astype(np.float32)
        keep_all = self.config.rule == "none"
        verdicts = bands(delta, *((-np.inf, np.inf) if keep_all else (self.config.lower, self.config.upper)))
        if keep_all:
            verdicts[:] = PROXIMAL
        return (
            table.append_column("ifd_student", pa.array(student, pa.float32()))
            .append_column("ifd_teacher", pa.array(teacher, pa.float32()))
            .append_column("delta_ifd", pa.array(delta, pa.float32()))
            .append_column("verdict", pa.array(verdicts.tolist(), pa.string()))
        )


def summarize(verdicts: list[str], sources: list[str], deltas: Floats) -> dict[str, Any]:
    """Counts per verdict, and per source with quantiles of Δ: what the manifest keeps and the command prints."""

    def one(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
        names, counts = np.unique(verdict_array[mask], return_counts=True)
        finite = deltas[mask & np.isfinite(deltas)]
        quantiles = [float(q) for q in np.quantile(finite, QUANTILES)] if finite.size else []
        return {
            "rows": int(mask.sum()),
            "verdicts": {str(name): int(count) for name, count in zip(names, counts, strict=True)},
            "delta_ifd_quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=False)),
        }

    verdict_array, source_array = np.asarray(verdicts, dtype=str), np.asarray(sources, dtype=str)
    overall = one(np.ones(len(verdict_array), dtype=bool))
    return overall | {"sources": {str(s): one(source_array == s) for s in np.unique(source_array)}}


def check_some_kept(summary: dict[str, Any], config: SelectionConfig) -> None:
    """Stop a run whose selection leaves nothing to train on, and say which bound did it."""
    counts = summary["verdicts"]
    if any(counts.get(verdict) for verdict in KEPT):
        return
    reasons: dict[str, Callable[[int], str]] = {
        DEGENERATE: lambda n: f"{n} below selection.lower {config.lower} (degenerate)",
        DISCONNECT: lambda n: f"{n} above selection.upper {config.upper} (disconnect)",
        UNDEFINED: lambda n: f"{n} with an undefined delta (a model gives the response alone a likelihood of 1)",
    }
    what = ", ".join(say(counts[verdict]) for verdict, say in reasons.items() if counts.get(verdict))
    quantiles = ", ".join(f"{float(q):.0%}: {value:.3f}" for q, value in summary["delta_ifd_quantiles"].items())
    raise RunError(
        f"Selection dropped all {summary['rows']} responses of this generation: {what}. Quantiles of delta: "
        f"{quantiles or 'none'}. Widen the bound, choose selection.rule none, or warm the student up with `npd sft`."
    )
