"""What a run copied to its mirror."""

from __future__ import annotations

from npd.observe.events import SpanName
from npd.records import number_of
from npd.report.facts import RunFacts
from npd.report.figures import number
from npd.report.tables import Table


def mirror_table(run: RunFacts) -> Table | None:
    """Copies, files, bytes, seconds and lag in all; None where there is no mirror."""
    spans = [event for event in run.events if event.name == SpanName.MIRROR]
    if not spans:
        return None

    def counted(name: str) -> list[float]:
        return [value for span in spans if (value := number_of(span.facts.get(name))) >= 0]

    row = [
        f"{len(spans):,}",
        *(f"{sum(counted(name)):,.0f}" for name in ("files", "deleted")),
        number(sum(counted("bytes")) / 1e6, 3),
        number(sum(span.seconds for span in spans), 3),
        number(max(counted("lag"), default=0.0), 3),
    ]
    where = str(run.option("checkpoint.mirror") or "a mirror").partition("?")[0]
    note = f"To {where}, beside the training. Lag: how long a file had been there when its copy was."
    return Table("Mirror", ["copies", "files", "deleted there", "MB", "seconds", "most lag, s"], [row], note)
