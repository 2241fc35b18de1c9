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
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from npd.errors import UserError
from npd.report import figures as fig
from npd.report import pictures as pic
from npd.report import tables as tab
from npd.report.facts import RunFacts, clock, gather, how_it_ended
from npd.report.output import check_output, write_output
from npd.report.samples import MOST_SAMPLES, MOST_TOKENS, Browser, browse
from npd.report.text import island, visible
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
class Section:
    id: str
    title: str
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
    sections: list[Section]
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
    evaluation = tab.evaluation_table(runs)
    sections = [
        Section("failure", "What went wrong", *failure(facts)),
        Section(
            "spent",
            "Before, after, and what it took",
            tables=[t for t in [evaluation] if t],
            bars=tab.bars(facts),
            figures=fig.evaluation_curves(runs),
        ),
        Section("training", "Training", figures=fig.curves(runs)),
        Section(
            "selection",
            "Selection: Δ-IFD",
            intro=[SELECTION] if np.isfinite(facts.column("delta_ifd").astype(float)).any() else [],
            figures=_some(
                pic.delta_histogram(facts), pic.ifd_scatter(facts), pic.boxes(facts, "generation"), pic.boxes(facts, "source")
            ),
            tables=[t for t in [sources] if t],
        ),
        Section(
            "data",
            "Responses",
            figures=_some(pic.lengths(facts)),
            tables=[t for t in [generations, tab.engine_table(facts)] if t],
        ),
        Section("time", "Time", intro=[TIME] if facts.events else [], figures=_some(pic.timeline(facts))),
        Section("samples", "Samples", browser=bool(browser.samples)),
        Section("configuration", "Configuration and versions", codes=configuration(facts)),
    ]
    command = f"npd {facts.command}" if facts.command else "npd"
    teacher = facts.option("teacher.model") or facts.option("teacher.server") or "references"
    when = f"written {clock(time.time())}"
    return Page(
        facts.name,
        f"{command} · {facts.option('student.model', '?')} ← {teacher} · {when}",
        facts.status.kind,
        tab.tiles(facts),
        [section for section in sections if section],
        [*([facts.status.sentence] if facts.status.kind in ("running", "between") else []), *facts.missing],
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


def failure(facts: RunFacts) -> tuple[list[str], list[tab.Table], list[tab.Bar], list[fig.Figure], list[Code]]:
    """Of a run that failed or was stopped: what happened, when, where, the last words, what to do next."""
    if facts.status.kind not in ("failed", "stopped"):
        return [], [], [], [], []
    store, event = Store(facts.path), facts.status.failure
    said = [facts.status.sentence]
    codes = []
    if event is not None:
        where = f"Process {event.get('process', '?')}, the {event.get('role', 'trainer')}"
        step = f", after step {facts.steps[-1]['step']:,}" if facts.steps else ", before the first optimiser step"
        said.append(f"{where}{step}.")
        message = str(event.get("message", ""))
        if message:
            codes.append(Code(f"The message ({event.get('error', 'error')})", message, open=True))
        if event.get("traceback"):
            codes.append(Code("Traceback", str(event["traceback"])))
    for death in [e for e in facts.events if e["name"] == "restart"][-5:]:
        how = f"refresh-{death.get('rank', '?')} died (exit status {death.get('code', '?')})"
        said.append(f"At {clock(death['start'])} {how} and was started again.")
    steps = store.checkpoints()
    resume = (
        f"It goes on from step {steps[-1]:,}, the newest checkpoint."
        if steps
        else "There is no checkpoint yet: training begins anew, from the parts that are there."
    )
    again = f"npd {facts.command or 'distill'} {shlex.quote(str(facts.path))}"
    if event is None:
        said.append(
            "What to do: if it ran out of memory (`dmesg` names killed processes), lower rollout.batch_size, "
            "scoring.batch_tokens or training.micro_batch_rows; then run the same command again. "
            f"{resume} Everything that was finished is kept."
        )
    elif how_it_ended(event).startswith("was stopped"):
        said.append(f"What to do: run the same command again. {resume}")
    elif event.get("explained"):
        said.append(f"What to do: the message says how to mend it; then run the same command again. {resume}")
    else:
        said.append(
            "What to do: npd has no explanation of its own for this one. The last line of the traceback names the cause; "
            f"mend it, or report it with the traceback, then run the same command again. {resume}"
        )
    codes.append(Code("To go on", again, open=True))
    codes += [Code(f"Last lines of logs/{name}", "\n".join(lines)) for name, lines in facts.logs.items() if lines]
    return said, [], [], [], codes


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

    sections = [
        Section(
            "runs",
            "Figures",
            tables=[t for t in [tab.run_table(runs), tab.evaluation_table(runs)] if t],
            figures=_some(*fig.evaluation_points(runs)),
        ),
        Section("differences", "What differs", tables=[tab.differing_table(runs)]),
        Section("training", "Training", figures=[*fig.evaluation_curves(runs), *fig.curves(runs)]),
        Section(
            "selection",
            "Selection: Δ-IFD",
            intro=[SELECTION],
            figures=[*_some(pic.delta_overlay(runs)), *each(pic.delta_histogram, "delta"), *each(pic.ifd_scatter, "scatter")],
        ),
        Section("data", "Responses", figures=each(pic.lengths, "lengths")),
        Section(
            "time",
            "Time",
            figures=each(pic.timeline, "timeline"),
            bars=[
                tab.Bar(f"{names[i]} · {bar.title}", bar.shares)
                for i, run in enumerate(runs)
                for bar in tab.bars(run)
                if bar.title.startswith("Time")
            ],
        ),
    ]
    missing = [f"{names[i]}: {line}" for i, run in enumerate(runs) for line in run.missing]
    return Page(
        " · ".join(names),
        f"{len(runs)} runs compared · written {clock(time.time())}",
        "",
        [],
        [section for section in sections if section],
        missing,
    )


# -- the page itself


def render(page: Page) -> str:
    figures = {figure.id: figure for section in page.sections for figure in section.figures}
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
