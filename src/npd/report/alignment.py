"""What a teacher with another tokenizer could say of the student's tokens."""

from __future__ import annotations

from npd.report.facts import RunFacts
from npd.report.tables import Table, middle_left_out, percent
from npd.store import REFERENCE


def aligned_table(run: RunFacts) -> Table | None:
    """One row a generation: response tokens by how they met the teacher's."""
    counts = {g: manifest.aligned for g, manifest in run.manifests.items() if manifest.aligned and manifest.aligned.total}
    rows = []
    for g in middle_left_out(sorted(counts)):
        found = None if g is None else counts[g]
        if found is None:
            rows.append(["…", "", "", "", ""])
            continue
        shares = (f"{n:,} ({percent(n / found.total)})" for n in (found.exact, found.merged, found.left_out))
        rows.append(["references" if g == REFERENCE else f"g{g}", f"{found.total:,}", *shares])
    note = (
        "Exact: one token of the student's is one of the teacher's, and has its top-k. Merged: it covers several of them, "
        "and has its own probability alone, or begins one, and has the top-k's. Left out: cross-entropy alone."
    )
    columns = ["generation", "response tokens", "exact", "merged", "left out"]
    return Table("Read with the teacher's own tokenizer", columns, rows, note) if rows else None
