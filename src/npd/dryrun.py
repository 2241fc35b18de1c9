"""`--dry-run`: its options, and what it shows."""

from __future__ import annotations

import math
from typing import Any

import click

from npd.config import Config
from npd.errors import UserError
from npd.observe.display import Display


class Number(click.FloatRange):
    """A range of numbers, which nan and infinity are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no number that can be reckoned with.", param, ctx)
        return found


DRY_RUN = (
    click.Option(["--dry-run"], is_flag=True, help="Check everything that can be checked, print the plan, and stop."),
    click.Option(
        ["--on"],
        metavar="NxDEVICE",
        help="With --dry-run: memory, split, hours and cost on such devices (8xH100, 16xA100-80GB, this, ...).",
    ),
    click.Option(["--price"], type=Number(min=0), help="With --on: what a device costs an hour."),
    click.Option(
        ["--measure"],
        is_flag=True,
        help="With --dry-run: time a little of the run on this machine, in about a minute, instead of taking known rates.",
    ),
    click.Option(
        ["--response-tokens"],
        type=Number(min=1),
        help="With --on: mean tokens of a response [default: as an earlier generation in run_dir, or half of the most]",
    ),
)


def asks_for_a_plan(
    command: str, *, dry_run: bool, on: str | None, price: float | None, measure: bool, response_tokens: float | None
) -> bool:
    """Is nothing to be run?

    Raises:
        UserError: options that mean nothing without each other.
    """
    paper = on is not None or measure
    if (paper and not dry_run) or (not paper and (price is not None or response_tokens is not None)):
        raise UserError(
            "--on and --measure say what a run would take and belong to --dry-run, --price and --response-tokens to --on. "
            f"For example: npd {command} CONFIG.yaml --dry-run --on 8xH100 --price 2.5."
        )
    return dry_run


def dry_run(
    config: Config,
    command: str,
    display: Display,
    *,
    dry_run: bool = True,
    on: str | None = None,
    price: float | None = None,
    measure: bool = False,
    response_tokens: float | None = None,
) -> None:
    """Check everything, say what will be done, and what it would take on other devices if that is asked for.

    Raises:
        UserError: what is wrong with the configuration, its data or its models; a device that nobody knows.
    """
    from npd.dataview import show_data
    from npd.hardware import names_others
    from npd.observe.console import show_plan
    from npd.plan import make_plan, plan_notes, plan_rows
    from npd.preflight import prepare

    setup = prepare(config, command, on_paper=on is not None and not measure and names_others(on))
    show_data(config, command, setup.chat, display, lambda: (setup.prompts, setup.held_out), told=True)
    plan = make_plan(setup)
    costs = None
    if on is not None or measure:
        from npd.costs import cost_table
        from npd.trial import costs_on

        found = costs_on(setup, on, measure=measure, response_tokens=response_tokens, display=display)
        costs = cost_table(found, price)
    rows, notes = plan_rows(setup, plan), plan_notes(setup, plan)
    if not setup.on_paper:
        from npd.fits import memory_notes, memory_rows, places

        there = places(setup)
        rows, notes = rows + memory_rows(setup, there), notes + memory_notes(there)
    show_plan(command, config.run_dir, rows, notes, display, costs)
