"""`--dry-run --on 8xH100`: what a run takes on devices that need not be here, for people."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow.compute as pc

from npd import models
from npd.config import Config, ModelConfig, PlacementConfig
from npd.errors import UserError
from npd.forecast import Load, Rates, Reader, model_of, rates
from npd.generations.itself import follows_snapshots, is_base
from npd.hardware import EFFICIENCY, GIB, Hardware
from npd.observe.console import CostTable
from npd.placement import names_producer
from npd.preflight import Setup
from npd.prompts import count_sources
from npd.registry import ENGINES
from npd.scoring import teacher_kind
from npd.selection import wants_free
from npd.splits import Case, Split
from npd.store import REFERENCE, Store
from npd.train.memory import USABLE, step_memory

ASSUMED = 0.5
"""Of rollout.max_new_tokens: the mean response, where nothing says how long responses are."""
HOURS = 3600.0
BUILT_IN = tuple(ENGINES)


class Lengths(NamedTuple):
    """What is known of a run's responses before they are written."""

    response: float
    """Tokens, on average."""
    kept: float
    """Share that is trained on."""
    source: str


class Measured(NamedTuple):
    """What a short trial on this machine found (`npd.trial`)."""

    rates: Rates
    lengths: Lengths
    memory: float
    """Bytes at its peak."""
    seconds: float
    """That it took."""
    said: str
    """On how much."""


@dataclass(frozen=True)
class Costs:
    """A case, its best split, and what its figures hang on."""

    case: Case
    devices: int
    best: Split
    """Of no more than these."""
    lengths: Lengths
    measured: Measured | None
    others: dict[str, float]
    """Engine -> hours, of those that the configuration did not choose."""
    reason: str = ""
    """Why the rates are what they are."""
    notes: tuple[str, ...] = ()
    """What of the configuration is not in the figures."""


def known_lengths(config: Config, said: float | None = None) -> Lengths:
    """Mean response and kept share: as the user says, as the newest generation in the run directory has it, or assumed."""
    most = config.rollout.max_new_tokens
    if said is not None:
        return Lengths(min(said, most), 1.0, "--response-tokens; all kept")
    store = Store(config.run_dir)
    for generation in reversed(range(min(config.schedule.generations, 1000))):
        if (store.generation(generation) / "manifest.json").exists():
            manifest = store.manifest(generation)
            if manifest is not None and manifest.rows and manifest.response_tokens:
                kept = manifest.selection.kept / manifest.rows
                return Lengths(manifest.response_tokens / manifest.rows, kept or 1.0, f"generation {generation} of the run")
    return Lengths(max(1.0, ASSUMED * most), 1.0, f"assumed: {ASSUMED:g} of rollout.max_new_tokens {most:,}, all kept")


def estimate(
    setup: Setup,
    device: Hardware,
    devices: int,
    *,
    response_tokens: float | None = None,
    measured: Measured | None = None,
    here: Hardware | None = None,
    engine: str | None = None,
) -> Costs:
    """What a run takes on `devices` of these.

    Args:
        measured: what a trial found on a device of this machine, `here`; on another kind each rate is scaled as the
            arithmetic for the two kinds scales.
        engine: another one than the configuration's.
    """
    config = setup.config
    chosen = engine or config.rollout.engine
    lengths = measured.lengths if measured and response_tokens is None else known_lengths(config, response_tokens)
    if not setup.generations.by_student and config.data.references == "given" and setup.prompts is not None:
        given = pc.fill_null(pc.list_value_length(setup.prompts.table["completion_ids"]), 0).to_numpy()
        lengths = Lengths(max(1.0, float(given.mean())), 1.0, "the data's own completions")
    case = case_of(setup, device, lengths, chosen)
    reason = "peaks and efficiencies"
    if measured is not None:
        found = measured.rates
        if here is not None and here != device:
            mine = case_of(setup, here, lengths, chosen).rates
            scaled = {
                name: getattr(found, name) * getattr(case.rates, name) / (getattr(mine, name) or 1.0)
                for name in ("train", "write", "read")
            }
            found = replace(found, **scaled)
        case = replace(case, rates=found)
        reason = f"measured here{', and scaled by the peaks' * (found is not measured.rates)}: {measured.said}"
    others: dict[str, float] = {}
    if engine is None and measured is None and case.load.written and device.kind != "cpu":
        for other in ENGINES:
            if other != chosen and other in BUILT_IN:
                there = case_of(setup, device, lengths, other).best(devices)
                others |= {other: there.times.whole / HOURS} if there is not None else {}
    best = case.best(devices)
    if best is None:
        size, beside = case.engine_devices, config.schedule.lead > 0
        raise UserError(
            f"rollout.{chosen} takes {size} devices for an engine, and {'one more' if beside else 'others'} must train, but "
            f"--on has {devices:,}{'' if beside else ' and schedule.lead is 0, so that nothing generates beside training'}.",
            "Give more devices, a lower tensor_parallel_size, or a schedule.lead above 0.",
        )
    return Costs(case, devices, best, lengths, measured, others, reason, _not_counted(setup))


def _not_counted(setup: Setup) -> tuple[str, ...]:
    config, contents = setup.config, setup.generations
    found = []
    if setup.on_paper and not names_producer(config.placement) and config.placement != PlacementConfig():
        found.append("placement is not taken: it names devices of one machine, and the split here is the best of all.")
    if (contents.mixed or not contents.by_student) and config.data.references == "teacher":
        found.append("The time that the teacher takes to write references is not counted.")
    return tuple(found)


def case_of(setup: Setup, device: Hardware, lengths: Lengths, engine: str) -> Case:
    """A run on devices of a kind: all that a split, and its memory, are reckoned from."""
    config, contents = setup.config, setup.generations
    assert setup.prompts is not None, "only what trains is planned"
    half = device.half and config.training.precision != "float32"
    known = setup.tokens.student
    student = model_of(known, trust_remote_code=config.student.trust_remote_code)
    step = step_memory(config, known, bfloat16=half, half=device.half)
    held = student.parameters * models.resolve_dtype(config.student, trained=True, half=device.half).itemsize
    adapters = models.adapter_bytes(known, config.student, half=device.half)
    prompts = pc.list_value_length(setup.prompts.table["prompt_ids"]).to_numpy()
    options, kind = config.rollout, ENGINES[engine]
    named = engine == options.engine
    writer, teachers = Reader(student, _itemsize(config.student, device)), _teachers(setup, device)
    size = kind.devices(options.engine_options if named else {}) if contents.by_student else 1
    waits = engine == ENGINES.default and (options.batching == "static" or models.expected_continuing(known) is not None)
    static = options.max_new_tokens / lengths.response if waits else 1.0
    load = Load(
        generations=config.schedule.generations,
        passes=config.schedule.passes,
        most_steps=float("inf"),
        responses=contents.responses(0),
        prompt=float(prompts.mean()),
        response=lengths.response,
        kept=lengths.kept,
        parts=len(contents.parts(0)),
        lead=config.schedule.lead,
        step_tokens=max(1, config.training.batch_tokens // config.packing.length) * config.packing.length,
        micro_tokens=config.training.micro_batch_rows * config.packing.length,
        at_once=max(1, min(options.batch_size, contents.responses(0))),
        longest=int(prompts.max()) + options.max_new_tokens,
        read_tokens=config.scoring.batch_tokens,
        free=wants_free(config.selection, config.scoring.free),
        written=contents.by_student,
        static=static,
        mixed=config.schedule.references if contents.mixed else 0.0,
        references=contents.responses(REFERENCE) if contents.mixed else 0,
    )
    load = replace(load, most_steps=_most_steps(config, load))
    of = rates(load, student, writer, teachers, device, kind.pace, size)
    passes = min(load.most_steps / load.pass_steps, float(load.generations * load.passes))
    asked = config.training.gradient_checkpointing
    return Case(
        load=load,
        rates=of,
        student=student,
        writer=writer,
        teachers=teachers,
        step=step,
        held=held,
        adapters=adapters,
        device=device,
        half=half,
        own_copy=bool(kind.holds_weights),
        engine_devices=size,
        checkpointing=(None if device.kind != "cpu" else False) if asked == "auto" else asked,
        checkpoints=passes * load.pass_steps / config.checkpoint.every_steps,
        shard={"full": True, "auto": False if config.training.compile else None}.get(config.training.shard, False),
        together=not kind.takes_first_gpus,
    )


def _most_steps(config: Config, load: Load) -> float:
    training = config.training
    limits = [math.inf if training.max_steps is None else float(training.max_steps)]
    if training.max_tokens is not None:
        a_pass = load.responses * load.kept * load.response / (1 - load.mixed)
        limits.append(training.max_tokens / a_pass * load.pass_steps)
    return min(limits)


def _itemsize(config: ModelConfig, device: Hardware) -> int:
    """Bytes of a weight that only reads or writes there."""
    return models.resolve_dtype(config, trained=False, half=device.half).itemsize


def _teachers(setup: Setup, device: Hardware) -> tuple[Reader, ...]:
    """Teachers that are loaded where generations are made: each stays once it was asked."""
    config, found = setup.config, []
    assert setup.prompts is not None, "only what trains is planned"
    counts = count_sources(setup.prompts.table)
    for key, teacher in config.all_teachers.items():
        known = setup.tokens.teachers.get(key)
        asked = sum(n for source, n in counts.items() if config.teacher_of(source) == key)
        if asked and known is not None and known.config is not None and not teacher_kind(teacher).elsewhere:
            model = model_of(known.config, trust_remote_code=teacher.trust_remote_code)
            own = not is_base(config, key) and not follows_snapshots(config, key)
            found.append(Reader(model, _itemsize(teacher, device), asked / len(setup.prompts), own))
    return tuple(found)


# -- for people


def cost_table(costs: Costs, price: float | None) -> CostTable:
    """What `--dry-run --on` shows."""
    title = f"On {costs.devices:,} × {costs.case.device.name}, on paper"
    return CostTable(title, cost_rows(costs, price), cost_notes(costs))


def cost_rows(costs: Costs, price: float | None) -> list[list[str]]:
    """(what, how much), for a table."""
    case, best, load, device = costs.case, costs.best, costs.case.load, costs.case.device
    hours = best.times.whole / HOURS
    written = f"{_tokens(load.response_tokens)} written and read, " if load.written else ""
    writes = f"writes {1 / case.rates.write:,.0f}, reads {_rate(case.rates.read)}, " if load.written else ""
    rows = [
        ["devices", f"{costs.devices:,} × {device.name}: {_giga(device.flops, 1e12)} TFLOP/s, "
         f"{_giga(device.bandwidth, 1e9)} GB/s, {device.memory / GIB:.1f} GiB ({device.source})"],
        ["mean response", f"{costs.lengths.response:,.0f} tokens ({costs.lengths.source})"],
        ["work of a generation", f"{written}{_tokens(load.pass_tokens)} in each of {load.passes} passes"],
        ["rates of one device", f"{writes}trains {1 / case.rates.train:,.0f} tokens/s ({costs.reason})"],
    ]  # fmt: skip
    for role, parts in best.memory.items():
        whole = sum(parts.values())
        told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size >= 0.005 * GIB)
        how = f" (shares weights among {best.shards})" * (best.shards > 1) + ", checkpointing" * best.checkpointing
        least = "at least " * (case.step.activations is None and role != "generating")  # a model that can't be counted
        rows.append([f"memory, {role}", f"{least}{whole / GIB:.1f} of {USABLE * device.memory / GIB:.1f} GiB: {told}"
                     + how * (role != "generating")])  # fmt: skip
    if costs.measured is not None:
        rows.append(["memory at the trial's peak", f"{costs.measured.memory / GIB:.1f} GiB, of one process here"])
    rows += [["split", _split(costs)], *_waiting(costs)]
    trained, generated = _time(best.times.trained), _time(best.times.generated)
    rows.append(
        ["time", f"{_time(best.times.whole)} ({trained} training, {generated} generating; evaluation is not counted)"]
    )
    rows.append(["device-hours", f"{hours * costs.devices:,.3g}, of which {100 * best.wasted(costs.devices):.0f}% idle"])
    if price is not None:
        rows.append(["cost", f"{hours * costs.devices * price:,.2f} at {price:g} an hour and device"])
    rows.append(["next to run out", _next(costs)])
    return rows


def _time(seconds: float) -> str:
    if seconds >= HOURS:
        return f"{seconds / HOURS:,.1f} hours" if seconds < 100 * HOURS else f"{seconds / HOURS:,.0f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 600 else f"{seconds:.0f} s"


def _tokens(count: float) -> str:
    return f"{count / 1e6:,.3g} million tokens" if count >= 1e6 else f"{count:,.0f} tokens"


def _giga(value: float, unit: float) -> str:
    return f"{value / unit:,.0f}" if value >= 10 * unit else f"{value / unit:.2g}"


def _rate(seconds: float) -> str:
    return f"{1 / seconds:,.0f}" if seconds else "elsewhere"


def _split(costs: Costs) -> str:
    best, load = costs.best, costs.case.load
    if costs.devices == 1:
        return "one device: training and generation take turns on it"
    rest = costs.devices - best.devices
    rests = f"; the other {rest:,} would rest" * (rest > 0)
    if not load.written:
        return (f"all {best.train:,} train" if not rest else f"{best.train:,} train") + rests
    if best.turns and rest and not costs.case.together:
        return (
            "training and generation take turns on one device, and the others rest: this engine shares a process with one "
            "trainer only; give schedule.lead above 0"
        )
    if best.turns:
        why = "" if load.lead else " (schedule.lead 0)"
        return f"{f'all {best.train:,}' if not rest else f'{best.train:,}'} train and generate in turns{why}{rests}"
    beside = f"{best.train:,} train, {best.generate:,} generate and score beside them{rests}"
    return f"{beside}; `accelerate launch --num_processes {best.train}`"


def _waiting(costs: Costs) -> list[list[str]]:
    """How long the trainer stands still, and which lead would have it wait least."""
    case, best = costs.case, costs.best
    if best.turns or not case.load.written:
        return []
    waits = 1 - best.times.trained / best.times.whole
    told = f"schedule.lead {case.load.lead:g}: the trainer waits {100 * waits:.0f}% of the time"
    longest = _with_lead(costs, float(case.load.passes))
    for lead in range(math.ceil(case.load.lead), case.load.passes + 1):
        there = _with_lead(costs, float(lead))
        if there.times.whole <= 1.01 * longest.times.whole:
            gain = 1 - there.times.whole / best.times.whole
            if gain > 0.01:
                told += f"; {lead} would take {100 * gain:.0f}% less time, with older responses"
            break
    return [["lead", told]]


def _with_lead(costs: Costs, lead: float) -> Split:
    case = replace(costs.case, load=replace(costs.case.load, lead=lead))
    return case.split(costs.best.train, costs.best.generate)


def _next(costs: Costs) -> str:
    """What lacks, or would be the first to lack."""
    case, best, device = costs.case, costs.best, costs.case.device
    role, full = best.fullest(device)
    parts = best.memory[role]
    largest = max(parts, key=lambda name: parts[name])
    if full > 1:
        lacking = (full - 1) * USABLE * device.memory / GIB
        told = f"memory: it does not fit. {lacking:.1f} GiB are lacking where there is {role}, most of it {largest}."
        return f"{told} {_mend(largest, case)}"
    count, engines = case.load.parts, (best.generate or best.train) // case.engine_devices
    writes = case.load.written and best.times.generated > best.times.trained
    if full < 0.8 and writes and count <= engines and (count < engines or best.devices < costs.devices):
        return (
            f"parts: a generation has {count:,} (rollout.part_size), so no more than {count:,} engines can write; memory is "
            f"{100 * full:.0f}% full"
        )
    micro = case.micro_batches
    if full < 0.8 and not writes and micro <= best.train < costs.devices:
        return (
            f"micro-batches: a step has {micro} (training.batch_tokens, packing.length), so no more than {micro} devices can "
            f"train; memory is {100 * full:.0f}% full"
        )
    told = f"memory where there is {role}: {100 * full:.0f}% full, most of it {largest}"
    if not best.turns and case.load.written:
        waits = 1 - best.times.trained / best.times.whole
        told += f"; {'generation is the slower side' if waits > 0.1 else 'training is the slower side'}"
    return told


def _mend(part: str, case: Case) -> str:
    shares = "More devices that share the weights, or student.lora."
    if case.shard is False:
        shares = "training.shard: full over several devices (without training.compile), or student.lora."
    return {
        "activations": "Lower packing.length or training.micro_batch_rows, or set training.gradient_checkpointing.",
        "weights": shares,
        "gradients": shares,
        "AdamW": shares,
        "key-value cache": "Lower rollout.batch_size or rollout.max_new_tokens.",
        "teacher": "A teacher behind a server, or one of fewer bits.",
    }.get(part, "Take devices with more memory.")


def cost_notes(costs: Costs) -> list[str]:
    """What the figures hang on, and what would change them most."""
    notes = []
    if costs.measured is None:
        said = "; ".join(f"{stage} {100 * (s.cpu if costs.case.device.kind == 'cpu' else s.accelerator):.0f}% ({s.source})"
                         for stage, s in EFFICIENCY.items())  # fmt: skip
        notes.append(f"Shares of the peaks: {said}. --measure times this machine instead.")
    for engine, hours in costs.others.items():
        notes.append(f"With rollout.engine {engine} it would take {_time(hours * HOURS)}.")
    return [*notes, *costs.notes]
