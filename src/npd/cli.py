"""Commands: parse, call, print."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
import yaml
from click.core import ParameterSource
from pydantic_core import PydanticUndefined

from npd.config import Config, KindOf, leaves, load_config, parse_yaml
from npd.dryrun import DRY_RUN, asks_for_a_plan, dry_run
from npd.errors import NpdError, UserError, foreign
from npd.inputs import Unreadable
from npd.observe.display import Display
from npd.report.command import report
from npd.signals import STOPPED, end_at_once, end_in_order

EPILOG = (
    "Exit status: 0 done; 2 what you gave is wrong (the message says how to mend it); 130 and 143 stopped by SIGINT (Ctrl-C) "
    "and SIGTERM; 1 anything else."
)


LONGEST_MESSAGE = 4000  # characters


class ConfigOption(click.Option):
    """An option that sets one key of the configuration, under the key's name or a short one."""

    def __init__(self, key: str, help: str, kind: str, *, name: str = "") -> None:
        self.key, self.short = key, bool(name)
        super().__init__([f"--{name or key}", "set__" + (name or key).replace(".", "__")], help=help, metavar=kind)


class ConfigCommand(click.Command):
    """A command on a CONFIG.yaml whose every key can be set by an option, shown by section."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [ConfigOption(key, _help(field), _kind(field)) for key, field in leaves(Config) if key != "provenance"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                key = param.key if isinstance(param, ConfigOption) and not param.short else ""
                title = key.split(".")[0] if "." in key else "run" if key else "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records, col_max=34)


def _help(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    shown = (
        "required" if default is PydanticUndefined else f"default {yaml.safe_dump(_as_yaml_types(default)).split(chr(10))[0]}"
    )
    return f"{' '.join((field.description or '').split())} [{shown}]"


def _as_yaml_types(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _kind(field: Any) -> str:
    annotation = field.annotation
    for mark in field.metadata:
        if isinstance(mark, KindOf):
            return "|".join(mark.registry)
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return {str: "TEXT", int: "INT", float: "FLOAT", bool: "BOOL"}.get(annotation, "VALUE")


def _overrides(ctx: click.Context) -> dict[str, Any]:
    values = {}
    for param in ctx.command.params:
        if isinstance(param, ConfigOption) and ctx.get_parameter_source(param.name or "") == ParameterSource.COMMANDLINE:
            text = ctx.params[param.name or ""]
            try:
                values[param.key] = parse_yaml(text)
            except Unreadable:  # for the option itself to judge
                values[param.key] = text
    return values


def _config(ctx: click.Context) -> Config:
    path = Path(ctx.params["config"])
    if os.path.isdir(path):  # a run directory, which may have been moved since
        return load_config(path / "config.yaml", {"run_dir": str(path)} | _overrides(ctx))
    return load_config(path, _overrides(ctx))


class Interrupted(Exception):
    """Ctrl-C was pressed; click would write an empty line for KeyboardInterrupt."""


class Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


@click.group(cls=Commands, epilog=EPILOG, context_settings={"max_content_width": 110})
@click.version_option(package_name="npd")
def main() -> None:
    """Near-Policy Distillation: make a small language model learn from a large one on its own responses.

    Start with `npd demo` (no download, a few minutes on a laptop), then write a CONFIG.yaml and try
    `npd distill CONFIG.yaml --dry-run`.
    """


def config_command(
    name: str, short_help: str, help: str, *params: click.Parameter
) -> Callable[[Callable[..., None]], click.Command]:
    """Register `npd NAME CONFIG [options]`, calling f(ctx, config, ...) with the resolved configuration."""

    def register(f: Callable[..., None]) -> click.Command:
        def callback(**kwargs: Any) -> None:
            ctx = click.get_current_context()
            own = {key: value for key, value in kwargs.items() if key != "config" and not key.startswith("set__")}
            f(_config(ctx), **own)

        arguments = [click.Argument(["config"], type=click.Path()), *params]
        command = ConfigCommand(name, params=arguments, callback=callback, help=help, short_help=short_help, epilog=EPILOG)
        main.add_command(command)
        return command

    return register


@config_command(
    "distill",
    "Distil a teacher into a student, end to end.",
    "Distil teacher into student as CONFIG says: rollout, scoring, selection, packing, training, generation by generation. "
    "Run it again on the same run_dir and it goes on where it stopped.",
    *DRY_RUN,
)
def distill(config: Config, **dry: Any) -> None:
    _train(config, "distill", dry)


@config_command(
    "sft",
    "Fine-tune on reference responses.",
    "Fine-tune the student on reference responses: the data's own completions (data.references: given) or the teacher's "
    "answers (teacher: sequence-level distillation). The same loop with kd_weight 0; schedule.passes passes.",
    *DRY_RUN,
)
def sft(config: Config, **dry: Any) -> None:
    _train(config, "sft", dry)


def _train(config: Config, command: str, dry: dict[str, Any]) -> None:
    from npd import run
    from npd.observe.console import show_result

    display = Display()
    if asks_for_a_plan(command, **dry):
        return dry_run(config, command, display, **dry)
    end_in_order()
    result = getattr(run, command)(config, display=display)
    show_result(result, display)


@config_command(
    "refresh",
    "Make the next missing generation and stop, or follow a run.",
    "Make the next missing generation of a distillation run from its newest snapshot, and stop. `npd distill` goes on "
    "from there. CONFIG may be a run directory. With --follow, make the generations of a run that `npd distill` trains, "
    "here or on another machine that shares the directory (there with placement.rollout external), as its snapshots appear. "
    "With --reselect, judge a finished generation's responses anew by the selection given, from its columns alone.",
    click.Option(["--follow"], is_flag=True, help="Make generations as snapshots appear, until the run is finished."),
    click.Option(
        ["--share"], default="1/1", show_default=True, help="With --follow: I/N makes every Nth part, from the Ith."
    ),
    click.Option(["--reselect"], is_flag=True, help="Apply selection.* to the newest generation before it is trained on."),
)
def refresh(config: Config, follow: bool, share: str, reselect: bool) -> None:
    from npd import run
    from npd.generations.follower import follow as follow_run

    display = Display()
    end_in_order()
    if follow and reselect:
        raise UserError("--follow and --reselect are two things to do; give one of them.")
    if follow:
        match = re.fullmatch(r"(\d+)/(\d+)", share)
        part, whole = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= part <= whole:
            raise UserError(
                f"--share is {foreign(share, 80)!r}; give I/N with I from 1 to N, such as 1/2 and 2/2 for two machines."
            )
        follow_run(Path(config.run_dir), None, part - 1, whole, display, 1.0, config=config)
        click.echo(f"All that {config.run_dir} asks for is made.")
        return
    generation = run.reselect(config, display=display) if reselect else run.refresh(config, display=display)
    click.echo(f"Generation {generation.index}, from snapshot v{generation.policy_version:06d}, is in {generation.path}.")


@config_command(
    "eval",
    "Evaluate a model.",
    "Evaluate a model on evaluation.tasks, on lm-eval's tasks of evaluation.harness and, with data.eval and a teacher, its "
    "distance to the teacher.",
    click.Option(["--model"], help="Model to evaluate [default: the run's student, else its newest snapshot, else student]"),
    ConfigOption("evaluation.harness.suite", "The paper's eleven benchmarks, by lm-eval.", "paper", name="suite"),
)
def evaluate(config: Config, model: str | None) -> None:
    from npd import run
    from npd.observe.console import show_figures

    display = Display()
    end_in_order()
    name, figures = run.evaluate(config, model, display=display)
    show_figures(name, {"": figures}, display)


@config_command(
    "data",
    "Show what a model is asked.",
    "Show rows of data.train as a model reads them (special tokens in ⟦brackets⟧, token ids, where the prompt ends and the "
    "response begins), what stops a response, what is left out and why, lengths, sources and their teachers. It needs no "
    "weights.",
    click.Option(["--rows"], type=click.IntRange(min=0), default=3, show_default=True, help="Rows to show, from the first."),
    click.Option(["--row"], type=click.IntRange(min=1), help="Show this row alone, counted from 1, and whole."),
)
def data(config: Config, rows: int, row: int | None) -> None:
    from npd.dataview import show_data
    from npd.generations.models import load_tokenizers
    from npd.preflight import chat_of, needed_of_eval
    from npd.prompts import read_data

    display, tokens = Display(), load_tokenizers(config)
    command, chat = "distill" if config.has_teacher else "sft", chat_of(config, tokens)
    show_data(config, command, chat, display, lambda: read_data(config, command, chat, needed_of_eval(config)), rows, row)
    for note in tokens.notes:
        display.say(note)


@config_command(
    "init-student",
    "Cut a student out of the teacher.",
    "Cut a student out of the teacher: keep some decoder layers, copy everything else, write it where student.model points.",
    click.Option(["--layers"], type=click.IntRange(min=1), help="Layers to keep, evenly spaced [default: half]"),
    click.Option(["--keep"], help="Layers to keep by index, such as 0,2,5 (instead of --layers)"),
)
def init_student(config: Config, layers: int | None, keep: str | None) -> None:
    from npd import models
    from npd.store import Store

    if config.teacher is None or config.teacher.server is not None or config.teacher.is_student:
        raise UserError("`npd init-student` cuts the student out of a teacher that lies here; set teacher.model.")
    target = Path(config.student.model)
    if os.path.lexists(target):
        raise UserError(f"student.model is {target}, which exists already; name a new directory, or delete that one.")
    if layers is not None and keep is not None:
        raise UserError("--layers and --keep both say which layers stay; give one of them.")
    model = models.load_model(config.teacher, trained=True)
    total = model.config.get_text_config().num_hidden_layers
    before = model.num_parameters()
    if keep is not None:
        try:
            kept = [int(index) for index in keep.split(",")]
        except ValueError:
            raise UserError(f"--keep must be layer indices such as 0,2,5, but it is {foreign(keep, 80)!r}.") from None
    else:
        if layers is not None and layers > total:
            raise UserError(f"--layers is {layers}, but the teacher has only {total} layers.")
        kept = models.evenly_spaced(layers or max(1, total // 2), total)
    student = models.cut_student(model, kept)
    tokenizer = models.load_tokenizer(config.teacher)
    dtype = models.saved_dtype(config.teacher)

    def save(path: Path) -> None:
        models.save_model(student, tokenizer, path, dtype=dtype)
        models.check_saved(student, path)

    end_in_order()
    Store(target.parent).save_model(target, save, {"layers": kept})
    click.echo(f"Kept layers {kept} of {total}: {student.num_parameters():,} of {before:,} parameters, in {target}.")


report.epilog = EPILOG
main.add_command(report)


@main.command(epilog=EPILOG, short_help="Copy a run to a mirror, or bring it down from there.")
@click.argument("source")
@click.argument("target")
def sync(source: str, target: str) -> None:
    """Copy a run directory to a mirror, or bring the run in a mirror down to an empty directory: what it needs to go on, or
    a finished run's student and record.

    Of SOURCE and TARGET one is a directory here and one a URI, such as s3://BUCKET/runs/first or file:///mnt/disk/first.
    A run with checkpoint.mirror does both by itself.
    """
    from npd.mirror.syncing import synchronise

    end_in_order()
    synchronise(source, target, Display())


@main.command(epilog=EPILOG, short_help="Compare four ways to train, on a toy task, in minutes.")
@click.option("--out", default="runs/demo", show_default=True, help="Directory for the demo's runs; must be new or empty.")
@click.option("--seed", default=0, show_default=True, help="Another seed gives other problems, samples and batches.")
def demo(out: str, seed: int) -> None:
    """Compare SFT, sequence-level KD, NPD and strict on-policy distillation on a toy task, in a few minutes.

    Needs no download: a tiny teacher ships inside the package. A student without skill gets a short SFT on few references
    and continues from that checkpoint in each of the ways; one table compares them.
    """
    from npd.demo.demo import run_demo

    end_in_order()
    run_demo(Path(out), seed, Display())


def _show(error: click.ClickException) -> None:
    """As click does, without what a word of the command line would do to the terminal."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
    click.echo(f"Error: {foreign(error.format_message(), LONGEST_MESSAGE)}", err=True)


def entry() -> None:
    """The `npd` command: errors that npd can explain are one paragraph on standard error."""
    if importlib.util.find_spec("torch") is None:
        click.echo("npd needs PyTorch; install it as https://pytorch.org says.", err=True)
        sys.exit(1)
    end_at_once()
    for stream in (sys.stdout, sys.stderr):  # of a terminal that lacks some characters
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a pipe that nobody reads
                stream.reconfigure(errors="replace")
    try:
        main(prog_name="npd", standalone_mode=False)
    except click.ClickException as error:
        _show(error)
        sys.exit(error.exit_code)
    except NpdError as error:
        click.echo(f"npd: {foreign(error, LONGEST_MESSAGE)}", err=True)
        sys.exit(error.exit_status)
    except (Interrupted, click.Abort, KeyboardInterrupt):
        _stopped(signal.SIGINT)
    except SystemExit as end:
        if end.code == 128 + signal.SIGTERM:
            _stopped(signal.SIGTERM)
        raise
    except Exception as error:
        _explain_disk(error)
        raise
    finally:
        end_at_once()  # an exception would be in the way of what Python does at its own end


def _stopped(number: signal.Signals) -> NoReturn:
    click.echo(STOPPED[number], err=True)
    sys.exit(128 + number)


def _explain_disk(error: Exception) -> None:
    """End with a paragraph where a disk is what failed a command that has no run; else return."""
    from npd.store.disk import explanation

    named = getattr(error, "filename", None)
    explained = explanation(error, Path(named if isinstance(named, str) else "standard output or a temporary file"))
    if explained is not None:
        click.echo(f"npd: {explained}", err=True)
        sys.exit(explained.exit_status)


if __name__ == "__main__":
    entry()
