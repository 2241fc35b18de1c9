"""What became of every case: benchmarks/results/fuzz.json, and from it the counts in docs/reliability.md.

python -m tests.fuzz.table runs/fuzz.jsonl
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks/results/fuzz.json", ROOT / "docs/reliability.md"
PACKAGES = ("npd", "torch", "transformers", "accelerate", "pyarrow", "tokenizers", "safetensors", "datasets")
NAMES = {
    "kills": "kills of a run's processes, and going on",
    "configurations": "bad configurations, half by options",
    "data": "bad data files",
    "answers": "answers of a hostile server",
    "models": "damaged model directories",
    "runs": "damaged run directories",
    "surroundings": "odd streams, limits, environments; files that go meanwhile",
    "disks": "sizes of a small disk, and room made",
}


def collect(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind, of each case's last try."""
    cases = {(line["kind"], line["number"]): line for line in lines}
    kinds: dict[str, Any] = {}
    for kind in NAMES:
        mine = [line for (name, _), line in cases.items() if name == kind]
        if mine:
            ends = Counter(str(line["status"]) for line in mine)
            groups = Counter(line["group"] for line in mine if line["group"])
            failed = sorted(line["number"] for line in mine if line["faults"])
            kinds[kind] = {"cases": len(mine), "ends": dict(sorted(ends.items())), "groups": dict(sorted(groups.items()))}
            kinds[kind] |= {"seconds": round(sum(line["seconds"] for line in mine)), "failed": failed}
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "kinds": kinds,
    }


def row(*cells: object) -> str:
    return f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in cells)} |"


def page(results: dict[str, Any]) -> str:
    lines = [row("what", "cases", "ended 0", "ended 2", "ended 1", "130, 143", "failed"), row(*["---"] * 7)]
    for kind, told in results["kinds"].items():
        ends = {name: told["ends"].get(name, 0) for name in ("0", "2", "1", "130", "143")}
        stopped = ends["130"] + ends["143"]
        lines.append(row(NAMES[kind], told["cases"], ends["0"], ends["2"], ends["1"], stopped, len(told["failed"])))
    groups: dict[str, int] = results["kinds"].get("kills", {}).get("groups", {})
    if groups:
        signals = sorted({name.split()[0] for name in groups})
        lines += ["", row("killed", *signals), row("---", *["---"] * len(signals))]
        for who in sorted({name.split(" ", 1)[1] for name in groups}):
            lines.append(row(who, *(groups.get(f"{name} {who}", 0) for name in signals)))
    failed = {kind: told["failed"] for kind, told in results["kinds"].items() if told["failed"]}
    if failed:
        lines += [
            "",
            "Failed: " + "; ".join(f"{kind} {', '.join(map(str, numbers))}" for kind, numbers in failed.items()) + ".",
        ]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([*lines, "", f"{results['system']}; {versions}."])


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    RESULTS.write_text(json.dumps(collect(lines), indent=1) + "\n")
    body = page(json.loads(RESULTS.read_text()))
    text = PAGE.read_text()
    PAGE.write_text(re.sub(r"(<!-- counts -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
