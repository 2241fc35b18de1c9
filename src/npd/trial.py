"""A little of a run, timed on this machine: the same code on a few of the same prompts, in a directory that goes again."""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from npd import run
from npd.config import Config
from npd.costs import Costs, Lengths, Measured, estimate, known_lengths
from npd.errors import NpdError, UserError
from npd.forecast import Rates
from npd.hardware import THIS, Hardware, named_devices, names_others, this_device
from npd.observe.display import Display
from npd.observe.events import SpanName, own_seconds, read_events
from npd.placement import names_producer
from npd.preflight import DISTILL, Setup
from npd.records import StepLine
from npd.store import Store

SECONDS = 25.0
"""That writing, and training, may take each, by the arithmetic of `npd.forecast`."""
MOST_TOKENS = 256  # of a response in a trial, and no less than that where more are allowed
ROUNDS = 3  # of rollout.batch_size: so that places are filled again, as in a long run
STEPS = 4  # the first of which warms up
ALONE = 0.85  # of the time on one core at least: a trial by itself on a CPU
MICRO_BATCHES = 8  # of a step, at most


def costs_on(
    setup: Setup,
    on: str | None,
    *,
    measure: bool,
    response_tokens: float | None,
    display: Display,
) -> Costs:
    """What a run takes on the devices that `--on` names; None: on this machine.

    Raises:
        UserError: there are no such devices, or what is measured here says nothing of them.
    """
    device, devices = named_devices(on or THIS)
    if not measure:
        return estimate(setup, device, devices, response_tokens=response_tokens)
    here = this_device()[0] if on is not None and names_others(on) else device
    if here.kind != device.kind:
        raise UserError(
            f"--measure times this machine, which has none, and that says nothing of {device.name}. Leave it out, or "
            "measure on such a device."
        )
    if setup.command != DISTILL:
        raise UserError("--measure times generating and training together: it is for npd distill.")
    measured = measure_here(setup, here, display)
    return estimate(setup, device, devices, response_tokens=response_tokens, measured=measured, here=here)


def measure_here(setup: Setup, here: Hardware, display: Display) -> Measured:
    """Time a few prompts through rollout, scoring and training, in turns, on one device.

    Raises:
        UserError: it cannot be run here.
    """
    guess = estimate(setup, here, 1).case
    with tempfile.TemporaryDirectory(prefix="npd-trial-") as folder:
        config = trial_config(setup.given, guess.rates, guess.load.prompt, guess.load.response, Path(folder))
        size, most = config.schedule.prompts, config.rollout.max_new_tokens
        display.say(f"Timing {size} prompts with up to {most} tokens each, for about a minute ...")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began, worked = time.perf_counter(), time.process_time()
        try:
            run.distill(config)
        except NpdError as error:
            raise UserError(f"--measure: the trial failed. {error.what}", error.remedy) from error
        seconds = time.perf_counter() - began
        found = _judge(setup.config, config, seconds, guess.rates)
        share = (time.process_time() - worked) / seconds
        return found._replace(said=found.said + disturbed(share)) if here.kind == "cpu" else found


def disturbed(share: float) -> str:
    """What to make of rates that were timed while the process had a core for such a share of the time."""
    if share >= ALONE:
        return ""
    return (
        f"; others computed here meanwhile (this process had a core {100 * share:.0f}% of the time): it may be faster alone"
    )


def trial_config(config: Config, guess: Rates, prompt: float, response: float, folder: Path) -> Config:
    """One generation of a few prompts, and a few steps on it."""
    rollout, training = config.rollout, config.training
    most = min(rollout.max_new_tokens, MOST_TOKENS)
    each = min(response, most) * (guess.write + guess.read)
    affordable = max(1, int(SECONDS / max(1e-9, each)))
    wanted = -(-ROUNDS * rollout.batch_size // rollout.samples_per_prompt)
    prompts = max(1, min(affordable // rollout.samples_per_prompt, wanted))
    if isinstance(config.schedule.prompts, int):
        prompts = min(prompts, config.schedule.prompts)
    tokens = SECONDS / STEPS / guess.train
    micro = training.micro_batch_rows * config.packing.length
    step = max(config.packing.length, min(training.batch_tokens, MICRO_BATCHES * micro, int(tokens)))
    lead: dict[str, Any] = {"lead": 0.0, "references": 0.0, "kl_budget": None}
    changed = {
        "run_dir": str(folder / "run"),
        "schedule": {"generations": 1, "passes": 1000, "prompts": prompts, **lead},
        "rollout": {"max_new_tokens": most, "part_size": min(rollout.part_size, prompts)},
        "placement": {"rollout": "auto"} if names_producer(config.placement) else {},
        "training": {"batch_tokens": step, "max_steps": STEPS, "max_tokens": None},
        "evaluation": {"tasks": [], "kl_prompts": 0, "teacher": False},
        "tracking": {"trackers": [], "report": False},
        "checkpoint": {"every_steps": STEPS},
    }
    sections = {
        name: getattr(config, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }
    return config.model_copy(update=sections)


def _judge(config: Config, trial: Config, seconds: float, guess: Rates) -> Measured:
    """What the trial's own records say."""
    store = Store(trial.run_dir)
    spans = [span for span in read_events(store.path / "events.jsonl") if span.thread == "MainThread"]
    took = own_seconds(spans)
    manifest = store.manifest(0)
    assert manifest is not None, "a run that ended has its manifest"
    written = manifest.response_tokens or 1
    response = written / max(1, manifest.rows)
    steps = [line for line in store.read_metrics() if isinstance(line, StepLine)]
    later = steps[1:] or steps
    each = statistics.median(1 / line.tokens_per_second for line in later if line.tokens_per_second)
    prompt = _mean_prompt(store)
    cut = (manifest.length_stops or 0) > 0 and trial.rollout.max_new_tokens < config.rollout.max_new_tokens
    kept = manifest.selection.kept / max(1, manifest.rows)
    lengths = known_lengths(config) if cut else Lengths(response, kept or 1.0, "the trial's")
    snapshot = took.get(SpanName.PUBLISH, 0.0) + took.get(SpanName.STORE, 0.0) + took.get(SpanName.FINISH, 0.0)
    checkpoint = took.get(SpanName.CHECKPOINT, 0.0)
    counted = sum(took.get(name, 0.0) for name in (SpanName.GENERATE, SpanName.SCORE, SpanName.TRAIN))
    rates = Rates(
        train=each * response / (prompt + response),
        write=took.get(SpanName.GENERATE, 0.0) / written,
        read=took.get(SpanName.SCORE, 0.0) / written,
        snapshot=snapshot,
        checkpoint=checkpoint,
        fixed=max(0.0, seconds - counted - snapshot - checkpoint),
    )
    said = f"{manifest.rows:,} responses of {response:,.0f} tokens, {len(steps)} steps, {seconds:.0f} s"
    return Measured(rates, lengths, peak_bytes(), seconds, said)


def _mean_prompt(store: Store) -> float:
    table = pa.concat_tables([store.read_part(0, part) for part in sorted(store.parts(0))])
    return float(sum(map(len, table["prompt_ids"].to_pylist())) / max(1, len(table)))


def peak_bytes() -> float:
    """The most that this process has held: of its GPU where there is one, else of memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


__all__ = ["costs_on", "measure_here", "peak_bytes", "trial_config"]
