"""Every table and warning that a terminal shows."""

from __future__ import annotations

from typing import Any

from npd.observe.display import Display
from npd.store import REFERENCE


def show_generation(generation: int, manifest: dict[str, Any], display: Display) -> None:
    """A finished generation as a table: verdicts, quantiles of Δ and adaptive bounds, per source."""
    if display.busy:  # one of many short generations
        return
    summary = manifest["selection"]
    names = sorted({v for s in summary["sources"].values() for v in s["verdicts"]})
    adaptive = "bounds" in summary
    rows = []
    for label, s in [("all", summary), *(summary["sources"].items() if len(summary["sources"]) > 1 else ())]:
        shown = [s["delta_ifd_quantiles"][q] for q in ("0.05", "0.5", "0.95") if s["delta_ifd_quantiles"]]
        quantiles = " ".join(f"{q:.2f}" for q in shown) or "-"
        counts = [str(s["verdicts"].get(name, 0)) for name in names]
        bounds = [" ".join(f"{b:.2f}" for b in s["bounds"])] if adaptive else []
        rows.append([label or "(none)", str(s["rows"]), *counts, quantiles, *bounds])
    name = "References" if generation == REFERENCE else f"Generation {generation}"
    title = f"{name}: {manifest['response_tokens']:,} response tokens, {manifest['length_stops']} stopped by length"
    columns = ["source", "responses", *names, "delta 5/50/95%", *(["kept from, to"] if adaptive else [])]
    display.table(title, columns, rows)


def warn_of_engine(check: dict[str, Any], bound: float, display: Display) -> None:
    """Say so if an engine is further from transformers than its kernels explain."""
    if not check["mean_abs_difference"] <= bound:
        display.say(
            f"Warning: the engine's log-probabilities differ from the snapshot's in transformers by "
            f"{check['mean_abs_difference']:.3g} nats per token on average (rollout.check_bound {bound:g}, "
            f"{check['tokens']:.0f} tokens of {check['samples']:.0f} responses). Precision and kernels explain some 0.01: it "
            "may answer with other weights, or in a precision that is too low for this model."
        )


def shows(key: str) -> bool:
    """Is this figure one for a person to see, rather than an interval's end or a count?"""
    return not key.endswith(("_low", "_high", "_tokens"))


def shown_figures(figures: dict[str, float]) -> str:
    """Evaluation figures in a line."""
    return ", ".join(f"{key.partition('/')[2]} {value:.4g}" for key, value in figures.items() if shows(key))


def show_plan(title: str, rows: list[list[str]], notes: list[str], display: Display) -> None:
    """What a run will do, before it starts."""
    display.table(title, ["what", "how much"], rows)
    for note in notes:
        display.say(note)
    display.say("Nothing was run. The configuration, tokenizers and data are in order.")
