"""`npd report`: a page about a run, a comparison of several, a trace."""

from __future__ import annotations

from pathlib import Path

import click

from npd.errors import UserError
from npd.signals import end_in_order

HELP = """Write a report about a run: one HTML file, complete in itself, to open from disk.

RUN_DIR is the run_dir of `npd distill`, `npd sft` or `npd refresh`, finished or not; the page goes to RUN_DIR/report.html. A
run writes the same page when it ends, also when it fails, and now and then while it goes on.

With --compare, one page about several runs: the same pictures, figures with intervals, and the keys that differ. With
--trace, the run's spans as a file for https://ui.perfetto.dev or chrome://tracing, instead of a page.
"""


@click.command("report", help=HELP, short_help="Write a page about a run, or compare runs.")
@click.argument("runs", metavar="RUN_DIR [RUN_DIR ...]", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="One page about all runs given, side by side.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write  [default: RUN_DIR/report.html; compare.html]")
@click.option("--trace", type=click.Path(path_type=Path), help="Write the run's spans as a Chrome/Perfetto trace here.")
def report(runs: tuple[Path, ...], compare: bool, out: Path | None, trace: Path | None) -> None:
    from npd.report.facts import gather
    from npd.report.page import write_comparison, write_report
    from npd.report.timeline import write_trace

    end_in_order()
    if compare and trace:
        raise UserError("--compare and --trace are two things to write; give one of them.")
    if compare:
        click.echo(f"The comparison is in {write_comparison(runs, out or Path('compare.html'))}.")
        return
    if len(runs) > 1:
        raise UserError(f"{len(runs)} run directories were given; add --compare for one page about all of them.")
    if trace is not None:
        count = write_trace(gather(runs[0]).events, trace)
        click.echo(f"{count:,} spans are in {trace}; open it in https://ui.perfetto.dev or chrome://tracing.")
        return
    click.echo(f"The report is in {write_report(runs[0], out=out)}.")
