"""Δ-IFD: which of the student's responses may be trained on.

Instruction-Following Difficulty is from Li et al., arXiv:2308.12032; its perplexity form from Superfiltering,
arXiv:2402.00530; the difference of teacher and student and its bands from Near-Policy Distillation, arXiv:2605.05940.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from npd.config import SelectionConfig
from npd.errors import RunError
from npd.records import (
    DEGENERATE,
    DISCONNECT,
    INCORRECT,
    KEPT,
    PROXIMAL,
    UNANIMOUS,
    UNDEFINED,
    UNVERIFIED,
    SelectionSummary,
)
from npd.registry import RULES
from npd.selection.reward import RIGHT, rewarded
from npd.selection.rules import Bounds, Judgement, Rule, bands, judge

__all__ = [
    "DEGENERATE", "DISCONNECT", "KEPT", "PROXIMAL", "QUANTILES", "UNDEFINED", "Bounds", "Judgement", "Rule", "Select",
    "Summary", "bands", "check_some_kept", "delta_ifd", "has_free", "instruction_following_difficulty", "wants_free",
]  # fmt: skip

Floats = npt.NDArray[np.float64]

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


def has_free(table: pa.Table) -> bool:
    """Were a scored table's responses read without their prompts as well?"""
    names = ("student_nll_free", "teacher_nll_free")
    return all(name in table.column_names and table[name].null_count == 0 for name in names)


def wants_free(selection: SelectionConfig, when: Literal["needed", "always"]) -> bool:
    """Are responses to be read without their prompts as well, by `scoring.free`?"""
    return when == "always" or bool(RULES[selection.rule]().reads_free)


class Select:
    """Stage: adds ifd_student, ifd_teacher, delta_ifd and verdict to a scored table."""

    def __init__(self, config: SelectionConfig) -> None:
        self.config = config
        self.rule: Rule = RULES[config.rule]()

    def __call__(self, table: pa.Table) -> pa.Table:
        if not has_free(table):
            for name in ("ifd_student", "ifd_teacher", "delta_ifd"):
                table = table.append_column(name, pa.nulls(len(table), pa.float32()))
            return self._judged(table)
        student, teacher = (
            instruction_following_difficulty(
                table[f"{who}_nll"].to_numpy(), table[f"{who}_nll_free"].to_numpy(), ifd=self.config.ifd
            )
            for who in ("student", "teacher")
        )
        with np.errstate(all="ignore"):
            # Rounded before it is judged, so that the verdict can be recomputed from the stored column.
            delta = (teacher - student).astype(np.float32)
        table = (
            table.append_column("ifd_student", pa.array(student, pa.float32()))
            .append_column("ifd_teacher", pa.array(teacher, pa.float32()))
            .append_column("delta_ifd", pa.array(delta, pa.float32()))
        )
        return self._judged(table)

    def _judged(self, table: pa.Table) -> pa.Table:
        verdicts = rewarded(np.asarray(judge(self.rule, table, self.config).verdicts), table, self.config.reward)
        return table.append_column("verdict", pa.array(verdicts.tolist(), pa.string()))


class Summary:
    """Counts per verdict, and per source with quantiles of Δ: what the manifest keeps and the command prints."""

    def __init__(self, config: SelectionConfig) -> None:
        self.config = config
        self.rule: Rule = RULES[config.rule]()
        self.verdicts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.deltas: defaultdict[str, list[npt.NDArray[np.float32]]] = defaultdict(list)
        self.bounds: defaultdict[str, list[Bounds]] = defaultdict(list)
        self.rewards: defaultdict[str, list[npt.NDArray[np.float64]]] = defaultdict(list)

    def add(self, table: pa.Table) -> None:
        """Count a finished part; needs columns source, verdict, delta_ifd, and those that the rule reads.

        Its column reward is counted where it has one.
        """
        judged = table["delta_ifd"].null_count < len(table)  # references are not
        for source, bounds in ((judge(self.rule, table, self.config).bounds if judged else None) or {}).items():
            self.bounds[source].append(bounds)
        for source in table["source"].unique().to_pylist():
            mine = table.filter(pc.equal(table["source"], source))
            self.verdicts[source].update(mine["verdict"].to_pylist())
            self.deltas[source].append(mine["delta_ifd"].to_numpy().astype(np.float32))
            if "reward" in mine.column_names and mine["reward"].null_count < len(mine):
                self.rewards[source].append(pc.drop_null(mine["reward"]).to_numpy().astype(np.float64))

    def result(self) -> SelectionSummary:
        """Of all that was added; `bounds` are the lowest and the highest that any part had."""
        sources = {source: self._one([source]) for source in sorted(self.verdicts)}
        return replace(self._one(list(self.verdicts)), sources=sources)

    def _one(self, sources: list[str]) -> SelectionSummary:
        counts = sum((self.verdicts[source] for source in sources), Counter())
        deltas = np.concatenate([piece for source in sources for piece in self.deltas[source]] or [np.empty(0, np.float32)])
        finite = deltas[np.isfinite(deltas)]
        quantiles = [float(q) for q in np.quantile(finite, QUANTILES)] if finite.size else []
        bounds = [b for source in sources for b in self.bounds[source]]
        rewards = np.concatenate([piece for source in sources for piece in self.rewards[source]] or [np.empty(0)])
        return SelectionSummary(
            counts.total(),
            dict(sorted(counts.items())),
            dict(zip(map(str, QUANTILES), quantiles, strict=False)),
            (float(min(b.lower for b in bounds)), float(max(b.upper for b in bounds))) if bounds else None,
            verified=len(rewards) or None,
            correct=int((rewards >= RIGHT).sum()) if rewards.size else None,
        )


def check_some_kept(summary: SelectionSummary, config: SelectionConfig) -> None:
    """Stop a run whose selection leaves nothing to train on, and say which bound did it."""
    if summary.kept:
        return
    rule: Rule = RULES[config.rule]()
    lower, upper = rule.name_bounds(config, None if summary.bounds is None else Bounds(*summary.bounds))
    reasons = {
        DEGENERATE: f"below {lower} (degenerate)",
        DISCONNECT: f"above {upper} (disconnect)",
        UNDEFINED: "with an undefined delta (a model gives the response alone a likelihood of 1)",
        INCORRECT: "wrong by their verifiers (incorrect)",
        UNANIMOUS: "to prompts whose responses are all right or all wrong (unanimous)",
        UNVERIFIED: "that no verifier judged (unverified)",
    }
    what = ", ".join(f"{count} {reasons.get(verdict, verdict)}" for verdict, count in summary.verdicts.items())
    quantiles = ", ".join(f"{float(q):.0%}: {value:.3f}" for q, value in summary.delta_ifd_quantiles.items())
    ways = ["warm the student up with `npd sft`"]
    if config.reward != "any" and {INCORRECT, UNANIMOUS, UNVERIFIED} & summary.verdicts.keys():
        ways.insert(0, "choose selection.reward any")
    if {DEGENERATE, DISCONNECT, UNDEFINED} & summary.verdicts.keys() or len(ways) == 1:
        ways[:0] = ["widen the bound", "choose selection.rule none"]
    remedy = ", ".join(ways[:-1]) + f", or {ways[-1]}."
    raise RunError(
        f"Selection dropped all {summary.rows} responses of this generation: {what}. Quantiles of delta: "
        f"{quantiles or 'none'}. {remedy[0].upper()}{remedy[1:]}"
    )
