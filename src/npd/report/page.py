"""One self-contained HTML page about a run, or about several side by side.

The page holds its figures, its script and plotly.js (as the plotly package has it) compressed; its Content-Security-Policy
lets nothing else in and no request out. Whatever models, prompts and logs say is data: escaped by the template, or written
to text nodes by the script.
"""

from __future__ import annotations

import base64
import gzip
import importlib.metadata
import importlib.util
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from npd.errors import UserError
from npd.observe.events import SpanName
from npd.report import figures as fig
from npd.report import pictures as pic
from npd.report import tables as tab
from npd.report import verified as ver
from npd.report.alignment import aligned_table
from npd.report.arms import arm_table, arms_of
from npd.report.cost import arm_points, cost_figures
from npd.report.facts import INTERRUPTED, SIGNALLED, RunFacts, clock, gather
from npd.report.mirrored import mirror_table
from npd.report.output import check_output, write_output
from npd.report.rightness import right_by_delta, right_comparison, right_table
from npd.report.samples import MOST_SAMPLES, MOST_TOKENS, Browser, browse
from npd.report.text import island, long_worded, visible
from npd.store import Store

MOST_BYTES = 5_900_000  # of a page; samples are left out until it fits

STATES = {
    "finished": "finished",
    "running": "running",
    "failed": "failed",
    "stopped": "stopped",
    "between": "not trained yet",
}


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file or a log, ready to copy."""

    title: str
    text: str
    open: bool = False


@dataclass(frozen=True)
class Chapter:
    id: str
    title: str
    short: str
    """Its name in the bar at the top."""
    intro: list[str] = field(default_factory=list)
    tables: list[tab.Table] = field(default_factory=list)
    bars: list[tab.Bar] = field(default_factory=list)
    figures: list[fig.Figure] = field(default_factory=list)
    codes: list[Code] = field(default_factory=list)
    browser: bool = False

    def __bool__(self) -> bool:
        return bool(self.intro or self.tables or self.bars or self.figures or self.codes or self.browser)


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    state: str
    tiles: list[tab.Tile]
    chapters: list[Chapter]
    missing: list[str]
    browser: Browser = field(default_factory=Browser)


def write_report(run_dir: str | Path, *, out: Path | None = None, going_on: bool | None = None) -> Path:
    """Write RUN_DIR/report.html, or `out`; returns its path. `going_on` where the caller knows better than the run's lock.

    Raises:
        UserError: this is no run's directory, or the page cannot be written.
    """
    path = out or Path(run_dir) / "report.html"
    check_output(path, "report.html")
    facts = gather(run_dir, going_on)
    samples, tokens = MOST_SAMPLES, MOST_TOKENS
    missing = list(facts.missing)
    while True:
        browser = browse(facts, samples, tokens)
        text = render(run_page(facts, browser))
        if len(text.encode()) <= MOST_BYTES or samples < 8:
            break
        samples, tokens = samples // 2, tokens // 2
        facts.missing = list(missing)
    write_output(path, text, "--out")
    return path


def write_comparison(run_dirs: Sequence[str | Path], out: Path) -> Path:
    """Write one page about several runs.

    Raises:
        UserError: fewer than two, one of them is no run's directory, or the page cannot be written.
    """
    if len(run_dirs) < 2:
        raise UserError("A comparison needs two run directories or more: npd report --compare RUN_A RUN_B.")
    check_output(out, "compare.html")
    write_output(out, render(comparison_page([gather(run_dir) for run_dir in run_dirs])), "--out")
    return out


# -- what is on a page


def run_page(facts: RunFacts, browser: Browser) -> Page:
    runs = [facts]
    generations = tab.generation_table(facts, browser)
    sources = tab.source_table(facts)
    evaluation, rewards = tab.evaluation_table(runs), ver.reward_table(facts)
    chapters = [
        what_went_wrong(facts),
        Chapter(
            "spent",
            "Before, after, and what it took",
            "Results",
            tables=[t for t in [evaluation] if t],
            bars=[*tab.time_bars(facts), *tab.response_bars(facts)],
            figures=fig.evaluation_curves(runs),
        ),
        Chapter("training", "Training", "Training", figures=fig.curves(runs)),
        Chapter(
            "selection",
            "Selection: Δ-IFD",
            "Selection",
            intro=[SELECTION] if np.isfinite(facts.column("delta_ifd").astype(float)).any() else [],
            figures=_some(
                pic.delta_histogram(facts),
                pic.ifd_scatter(facts),
                pic.boxes(facts, "generation"),
                pic.boxes(facts, "source"),
                right_by_delta(facts),
            ),
            tables=[t for t in [right_table(facts), sources] if t],
        ),
        Chapter(
            "rewards",
            "Right and wrong responses",
            "Rewards",
            intro=[ver.ROLLOUTS] if rewards else [],
            figures=_some(ver.reward_histogram(facts)),
            tables=[rewards] if rewards else [],
        ),
        Chapter(
            "data",
            "Responses",
            "Responses",
            figures=_some(pic.lengths(facts)),
            tables=[t for t in [generations, aligned_table(facts), tab.engine_table(facts)] if t],
        ),
        Chapter(
            "time",
            "Time",
            "Time",
            intro=[TIME] if facts.events else [],
            figures=_some(pic.timeline(facts)),
            tables=[t for t in [mirror_table(facts)] if t],
        ),
        Chapter("samples", "Samples", "Samples", browser=bool(browser.samples)),
        Chapter("configuration", "Configuration and versions", "Configuration", codes=configuration(facts)),
    ]
    command = f"npd {facts.command}" if facts.command else "npd"
    teacher = facts.option("teacher.model") or facts.option("teacher.server") or "references"
    when = f"written {clock(time.time())}"
    return Page(
        facts.name,
        f"{command} · {facts.option('student.model', '?')} ← {teacher} · {when}",
        facts.status.kind,
        tab.tiles(facts),
        [chapter for chapter in chapters if chapter],
        [
            *([facts.status.sentence] if facts.status.kind in ("running", "between") else []),
            *ver.warnings(facts),
            *facts.missing,
        ],
        browser,
    )


SELECTION = (
    "IFD is how much a prompt helps a model to predict the response: its mean negative log-likelihood with the prompt, over "
    "that without. Δ = IFD of the teacher − IFD of the student. Degenerate responses lie below the band, proximal ones in "
    "it, disconnected ones above it; only proximal ones are trained on."
)
TIME = (
    "Each lane is a process, or a thread beside it; at any time its innermost span is drawn. Hatched: it waited. Blank: "
    "nothing was recorded. `npd report RUN_DIR --trace FILE.json` writes the same for Perfetto."
)


def _some(*figures: fig.Figure | None) -> list[fig.Figure]:
    return [figure for figure in figures if figure is not None]


def what_went_wrong(facts: RunFacts) -> Chapter:
    """Of a run that failed or was stopped: what happened, when, where, the last words, what to do next."""
    chapter = Chapter("failure", "What went wrong", "What went wrong")
    if facts.status.kind not in ("failed", "stopped"):
        return chapter
    store, failed, failure = Store(facts.path), facts.status.failed, facts.status.failure
    said = [facts.status.sentence]
    codes = []
    if failed is not None and failure is not None:
        step = f", after step {facts.steps[-1].step:,}" if facts.steps else ", before the first optimiser step"
        said.append(f"Process {failed.process}, the {failed.role}{step}.")
        if failure.message:
            codes.append(Code(f"The message ({failure.error})", failure.message, open=True))
        if failure.traceback:
            codes.append(Code("Traceback", failure.traceback))
    for death in [event for event in facts.events if event.name == SpanName.RESTART][-5:]:
        how = f"refresh-{death.facts.get('rank', '?')} died (exit status {death.facts.get('code', '?')})"
        said.append(f"At {clock(death.start)} {how} and was started again.")
    steps = store.checkpoints()
    resume = (
        f"It goes on from step {steps[-1]:,}, the newest checkpoint."
        if steps
        else "There is no checkpoint yet: training begins anew, from the parts that are there."
    )
    again = f"npd {facts.command or 'distill'} {shlex.quote(str(facts.path))}"
    if failure is None:
        said.append(
            "What to do: if it ran out of memory (`dmesg` names killed processes), lower rollout.batch_size, "
            "scoring.batch_tokens or training.micro_batch_rows; then run the same command again. "
            f"{resume} Everything that was finished is kept."
        )
    elif failure.error in (*SIGNALLED, *INTERRUPTED):
        said.append(f"What to do: run the same command again. {resume}")
    elif failure.explained:
        said.append(f"What to do: the message says how to mend it; then run the same command again. {resume}")
    else:
        said.append(
            "What to do: npd has no explanation of its own for this one. The last line of the traceback names the cause; "
            f"mend it, or report it with the traceback, then run the same command again. {resume}"
        )
    codes.append(Code("To go on", again, open=True))
    codes += [Code(f"Last lines of logs/{name}", "\n".join(lines)) for name, lines in facts.logs.items() if lines]
    return replace(chapter, intro=said, codes=codes)


def configuration(facts: RunFacts) -> list[Code]:
    codes = [Code("config.yaml", facts.config_text)] if facts.config_text else []
    if facts.versions:
        codes.append(Code("Package versions", "\n".join(f"{name}=={version}" for name, version in facts.versions.items())))
    if facts.logs and facts.status.kind not in ("failed", "stopped"):
        codes += [Code(f"Last lines of logs/{name}", "\n".join(lines)) for name, lines in facts.logs.items() if lines]
    return codes


def comparison_page(runs: list[RunFacts]) -> Page:
    """The same pictures over each other where they are curves, side by side where they are not."""
    names = [fig.label(runs, i) for i in range(len(runs))]

    def each(draw: Any, id: str) -> list[fig.Figure]:
        drawn = [(names[i], draw(run, f"{id}-{i}")) for i, run in enumerate(runs)]
        return [fig.retitled(figure, f"{name}: {figure.title}") for name, figure in drawn if figure is not None]

    arms = arms_of(runs)
    chapters = [
        Chapter(
            "runs",
            "Figures",
            "Figures",
            tables=[t for t in [tab.run_table(runs), tab.evaluation_table(runs)] if t],
            figures=_some(*fig.evaluation_points(runs)),
        ),
        Chapter(
            "evidence",
            "Arms, seconds and tokens",
            "Evidence",
            tables=[t for t in [arm_table(runs, arms), right_comparison(runs)] if t],
            figures=[*arm_points(runs, arms), *cost_figures(runs, arms)],
        ),
        Chapter("differences", "What differs", "What differs", tables=[tab.differing_table(runs)]),
        Chapter("training", "Training", "Training", figures=[*fig.evaluation_curves(runs), *fig.curves(runs)]),
        Chapter(
            "selection",
            "Selection: Δ-IFD",
            "Selection",
            intro=[SELECTION],
            figures=[*_some(pic.delta_overlay(runs)), *each(pic.delta_histogram, "delta"), *each(pic.ifd_scatter, "scatter")],
        ),
        Chapter("data", "Responses", "Responses", figures=each(pic.lengths, "lengths")),
        Chapter(
            "time",
            "Time",
            "Time",
            figures=each(pic.timeline, "timeline"),
            bars=[
                tab.Bar(f"{names[i]} · {bar.title}", bar.shares) for i, run in enumerate(runs) for bar in tab.time_bars(run)
            ],
        ),
    ]
    missing = [f"{names[i]}: {line}" for i, run in enumerate(runs) for line in run.missing]
    return Page(
        " · ".join(names),
        f"{len(runs)} runs compared · written {clock(time.time())}",
        "",
        [],
        [chapter for chapter in chapters if chapter],
        missing,
    )


# -- the page itself


def render(page: Page) -> str:
    figures = {figure.id: figure for chapter in page.chapters for figure in chapter.figures}
    data = {
        "figures": {
            id: {"traces": figure.traces, "layout": figure.layout, "height": figure.height} for id, figure in figures.items()
        },
        "samples": page.browser.samples,
        "vocabulary": page.browser.vocabulary,
        "responses": page.browser.responses,
    }
    environment = Environment(
        loader=PackageLoader("npd.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["long_worded"] = long_worded
    source = {name: environment.loader.get_source(environment, name)[0] for name in ("page.css", "page.js", "browser.js")}  # type: ignore[union-attr]
    return environment.get_template("page.html").render(
        page=page,
        states=STATES,
        nonce=secrets.token_urlsafe(18),
        source=source,
        data=packed(island(data)),
        plotly=plotly_packed() if figures else "",
        version=importlib.metadata.version("npd"),
    )


def packed(text: str) -> str:
    """Text as base64 of gzip: small, and nothing in it can be taken for markup."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode("ascii")


@lru_cache(maxsize=1)
def plotly_packed() -> str:
    """plotly.js out of the installed plotly package, whose Python code is not imported.

    Raises:
        UserError: the package is not installed, or not whole.
    """
    spec = importlib.util.find_spec("plotly")
    file = Path(spec.origin).parent / "package_data/plotly.min.js" if spec and spec.origin else Path("plotly")
    try:
        return packed(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"The report's plots need the plotly package, but {file} can't be read; pip install plotly."
        ) from error
