"""The tables of README.md and docs/benchmarks.md, objectives.md and smollm2.md, from benchmarks/results, between their marks.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, spread
from benchmarks.evidence.analysis import Mean

PAGES = tuple(map(Path, ("docs/benchmarks.md", "docs/objectives.md", "docs/smollm2.md", "README.md")))
Runs = list[dict[str, Any]]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between(text: str, name: str, body: str) -> str:
    """A page's text with this between the marks of that name; as it is where it has none."""
    mark = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    return re.sub(mark, lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)


def ranged(values: Sequence[float], digits: int = 1, scale: float = 1.0) -> str:
    """Median [least, most]."""
    s = spread([v * scale for v in values])
    if len(values) == 1:
        return f"{s['median']:,.{digits}f}"
    return f"{s['median']:,.{digits}f} [{s['least']:,.{digits}f}, {s['most']:,.{digits}f}]"


def grouped(runs: Runs, *keys: str) -> dict[Any, Runs]:
    groups: defaultdict[Any, Runs] = defaultdict(list)
    for run in runs:
        groups[tuple(run[key] for key in keys) if len(keys) > 1 else run[keys[0]]].append(run)
    return dict(groups)


def packing(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            ranged([r["seconds"] for r in runs]),
            f"{100 * runs[0]['fill']:.2f}%",
            f"{100 * runs[0]['fill_in_blocks']:.2f}%",
            f"{100 * runs[0]['padded_fill']:.0f}%",
        ]
        for name, runs in grouped(results["runs"], "case").items()
    ]
    return table(["lengths", "seconds for a million", "fill", "in blocks of 65,536", "fill of one padded batch"], rows)


def loss(results: dict[str, Any]) -> str:
    o = results["options"]
    names = {"npd": "npd", "dense": "dense", "compiled": "chunks, torch.compile"}
    by = grouped([r for r in results["runs"] if "failed" not in r], "contender")
    dense = {r["turn"]: r for r in by.get("dense", [])}
    rows = []
    for name, runs in by.items():
        pairs = [(dense[r["turn"]], r) for r in runs if r["turn"] in dense]
        rows.append(
            [
                names[name],
                f"{o['tokens']:,} × {o['width']:,}, K = {o['top_k']}",
                ranged([r["seconds"] for r in runs]),
                ranged([r["share_of_floor"] for r in runs], 0, 100) + "%",
                ranged([d["seconds"] / r["seconds"] for d, r in pairs], 2) + "×" if pairs else "",
                f"{statistics.median(r['peak_mib'] for r in runs):,.0f}",
                f"{statistics.median(d['peak_mib'] / r['peak_mib'] for d, r in pairs):.1f}×" if pairs else "",
            ]
        )
    heads = [
        "contender",
        "tokens × width",
        "seconds",
        "of the floor",
        "speed against dense",
        "peak MiB",
        "dense's peak / its peak",
    ]
    return table(heads, rows)


def scoring(results: dict[str, Any]) -> str:
    out = []
    for model, runs in grouped(results["runs"], "model").items():
        timed = [r for r in runs if "seconds" in r]
        floor = {r["turn"]: r["seconds"] for r in timed if r["contender"] == "floor"}
        for name, mine in grouped(timed, "contender").items():
            out.append(
                [
                    Path(model).stem.split(".")[0],
                    name,
                    ranged([r["tokens"] / r["seconds"] for r in mine], 0),
                    ranged([floor[r["turn"]] / r["seconds"] for r in mine], 0, 100) + "%",
                    ranged([(r["operations"] + _head(r)) / r["seconds"] / r["matmul_rate"] for r in mine], 0, 100) + "%",
                ]
            )
    heads = ["model", "contender", "tokens/s", "of the bare forward pass", "products at this machine's rate"]
    return table(heads, out)


def _head(run: dict[str, Any]) -> float:
    operations: float = {"floor": 0.0, "padded": run["head_operations"] * run["tokens"] / run["response_tokens"]}.get(
        run["contender"], run["head_operations"]
    )
    return operations


def stored(results: dict[str, Any]) -> str:
    rows = []
    for run in results["runs"]:
        if run["contender"] == "stored":
            b = run["bytes"]
            columns = ["topk_ids", "topk_logprobs", "behavior_logprobs", "response_ids", "whole part"]
            both = b["topk_ids"] + b["topk_logprobs"]
            cells = [f"{b[c]:.1f}" for c in columns]
            rows.append([Path(run["model"]).stem.split(".")[0], f"{run['response_tokens']:,}", f"{both:.1f}", *cells])
    heads = [
        "model",
        "response tokens",
        "both top-k columns",
        "ids",
        "log-probabilities",
        "behaviour",
        "response",
        "whole part",
    ]
    return table(heads, rows)


def floor(results: dict[str, Any]) -> str:
    rows = []
    for (pair, stage), runs in grouped([r for r in results["runs"] if "seconds" in r], "pair", "stage").items():
        last = runs[-1]
        share = [r["operations"] / r["matmul_rate"] / r["seconds"] for r in runs]
        rows.append(
            [
                pair,
                stage,
                f"{last['operations'] / 1e9:,.1f}" if last["operations"] else "",
                ranged([r["seconds"] for r in runs], 2),
                ranged([1e6 * r["seconds"] / r["response_tokens"] for r in runs], 0),
                ranged(share, 0, 100) + "%" if last["operations"] else "",
            ]
        )
    heads = ["models", "stage", "Gflop", "seconds", "µs per response token", "of the floor"]
    return table(heads, rows)


def profiles(results: dict[str, Any]) -> str:
    profiled = [r for r in results["runs"] if "shares" in r]
    rows = [[r["pair"], r["stage"], *(f"{100 * share:.0f}%" for share in r["shares"].values())] for r in profiled]
    return table(["models", "stage", *profiled[0]["shares"]], rows)


def growth(results: dict[str, Any]) -> str:
    rows = []
    for what, runs in grouped(results["runs"], "what").items():
        base = runs[0]
        for r in runs:
            if "failed" in r:
                continue
            parts = [f"{k} {r[k]:.2f}" for k in ("generate", "score", "store", "finish", "train", "pack_seconds") if k in r]
            rows.append(
                [
                    what,
                    f"{r['count']:,}",
                    f"{r['seconds']:.2f}",
                    f"{1e6 * r['seconds'] / r['count']:,.0f}",
                    f"{r['mib']:.0f}",
                    f"{r['mib'] / base['mib']:.2f}×",
                    ", ".join(parts),
                ]
            )
    return table(["part", "count", "seconds", "µs each", "MiB at most", "memory against 1×", "of the seconds"], rows)


NAMES = {
    "npd": "npd, paper's schedule",
    "npd-longer": "npd, five generations",
    "strict": "npd, strict on-policy",
    "trl-distillation": "TRL DistillationTrainer",
    "trl-gkd": "TRL GKDTrainer",
    "plain": "a plain loop with `generate()`",
}


def distillation(results: dict[str, Any]) -> str:
    by = grouped(results["runs"], "contender")
    npd = {r["seed"]: r for r in by["npd"]}
    rows: list[list[str]] = []
    for name, runs in by.items():
        ratio = [npd[r["seed"]]["tokens"] / npd[r["seed"]]["seconds"] / (r["tokens"] / r["seconds"]) for r in runs]
        rows.append(
            [
                NAMES[name],
                str(len(runs)),
                ranged([r["steps"] for r in runs], 0),
                ranged([r["tokens"] / r["steps"] for r in runs], 0),
                ranged([r["tokens"] / 1000 for r in runs], 0),
                ranged([r["seconds"] for r in runs]),
                ranged([r["tokens"] / r["seconds"] for r in runs], 0),
                ranged(ratio) + "×",
                ranged([r["curve"][-1][2] for r in runs], 1, 100),
            ]
        )
    heads = [
        "contender",
        "seeds",
        "steps",
        "response tokens a step",
        "thousand in all",
        "seconds",
        "tokens/s",
        "npd is faster by",
        "accuracy %",
    ]
    return table(heads, rows)


def quality(results: dict[str, Any]) -> str:
    """The others' seconds to their last accuracy, and npd's to the same one, with the same seed."""
    by = grouped(results["runs"], "contender")
    longer = {r["seed"]: r for r in by["npd-longer"]}
    rows = []
    for name, runs in by.items():
        if name.startswith("npd"):
            continue
        pairs = [(r, _reach(longer[r["seed"]]["curve"], r["curve"][-1][2])) for r in runs]
        there = [(r, seconds) for r, seconds in pairs if seconds is not None]
        rows.append(
            [
                NAMES[name],
                ranged([r["curve"][-1][2] for r in runs], 1, 100),
                ranged([r["curve"][-1][0] for r in runs]),
                f"{len(there)} of {len(runs)}",
                ranged([seconds for _, seconds in there]) if there else "",
                ranged([r["curve"][-1][0] / seconds for r, seconds in there]) + "×" if there else "",
            ]
        )
    heads = ["contender", "its last accuracy %", "seconds to it", "seeds in which npd reached it", "npd's seconds", "ratio"]
    return table(heads, rows)


def _reach(curve: list[list[float]], level: float) -> float | None:
    """Seconds when an accuracy was first seen after training had begun."""
    return next((seconds for seconds, step, accuracy in curve if step and accuracy >= level), None)


def stages(results: dict[str, Any]) -> str:
    rows = []
    for r in results["runs"]:
        if "stages" in r and r["seed"] == results["runs"][0]["seed"]:
            shown = {k: v for k, v in r["stages"].items() if k not in ("evaluate", "wall") and v > 0.005 * r["seconds"]}
            told = ", ".join(f"{k} {v:.1f}" for k, v in sorted(shown.items(), key=lambda item: -item[1]))
            publish = r["stages"].get("publish", 0.0) / r["seconds"]
            rows.append([NAMES[r["contender"]], f"{r['seconds']:.1f}", told, f"{100 * publish:.2f}%"])
    return table(["contender", "seconds", "of which", "publishing"], rows)


def tails(results: dict[str, Any]) -> str:
    """Tokens a second of every contender, and npd's over them within a turn."""
    rows = []
    for (shape, name), runs in grouped(_measured(results), "shape", "contender").items():
        npd = {r["turn"]: r for r in _measured(results) if (r["shape"], r["contender"]) == (shape, "npd")}
        ratio = [_speed(npd[r["turn"]]) / _speed(r) for r in runs if r["turn"] in npd]
        rows.append(
            [
                shape,
                NAMES[name],
                str(len(runs)),
                ranged([r["tokens"] / 1000 for r in runs]),
                ranged([r["seconds"] for r in runs]),
                ranged([_speed(r) for r in runs], 0),
                ranged(ratio) + "×" if ratio else "",
            ]
        )
    heads = ["models", "contender", "turns", "thousand tokens trained", "seconds", "tokens/s", "npd is faster by"]
    return table(heads, rows)


def tails_stages(results: dict[str, Any]) -> str:
    """Where the time of a trained token goes."""
    rows = []
    for (shape, name), runs in grouped(_measured(results), "shape", "contender").items():
        cells = {k: [1e6 * r["stages"].get(k, 0.0) / r["tokens"] for r in runs] for k in ("generate", "score", "train")}
        whole = [1e6 * r["seconds"] / r["tokens"] for r in runs]
        cells["other"] = [w - sum(values) for w, values in zip(whole, zip(*cells.values(), strict=True), strict=True)]
        rows.append([shape, NAMES[name], *(f"{statistics.median(v):,.0f}" for v in (whole, *cells.values()))])
    return table(["models", "contender", "µs per trained token", "generating", "scoring", "training", "other"], rows)


def tails_count(results: dict[str, Any]) -> str:
    """Operations that each way of working needs, what they would take at this machine's rate, and what was measured."""
    counts = {r["shape"]: r["count"] for r in results["runs"] if "count" in r}
    ways = {"npd": "npd", "strict": "strict"}
    rows = []
    for (shape, name), runs in grouped(_measured(results), "shape", "contender").items():
        if shape not in counts or runs[0]["matmul_rate"] is None:
            continue
        count, rate = counts[shape][ways.get(name, "padded")], statistics.median(r["matmul_rate"] for r in runs)
        floor, best = rate / sum(count.values()), rate / sum(counts[shape]["npd"].values())
        speed = statistics.median(_speed(r) for r in runs)
        rows.append(
            [
                shape,
                NAMES[name],
                *(f"{value / 1e6:,.1f}" for value in (*count.values(), sum(count.values()))),
                f"{floor:,.0f}",
                f"{speed:,.0f}",
                f"{100 * speed / floor:.0f}%",
                f"{sum(count.values()) / sum(counts[shape]['npd'].values()):.1f}×",
                f"{best / speed:.1f}×",
            ]
        )
    heads = ["models", "contender", "generating", "scoring", "training", "Mflop per trained token", "floor, tokens/s"]
    heads += ["measured", "of its floor", "npd's floor is faster than its floor by", "and than it by"]
    return table(heads, rows)


def tails_lengths(results: dict[str, Any]) -> str:
    heads = ["models", "student", "teacher", "vocabulary", "mean response", "longest of 64 on average", "longest"]
    rows = [
        [
            r["shape"],
            f"{r['width']} × {r['layers']}",
            f"{r['teacher_width']} × {r['teacher_layers']}",
            f"{r['vocabulary']:,}",
            *(f"{r[key]:,.0f}" for key in ("mean", "longest_of_64", "longest")),
        ]
        for r in results["runs"]
        if "count" in r
    ]
    return table(heads, rows)


def _measured(results: dict[str, Any]) -> Runs:
    return [r for r in results["runs"] if "tokens" in r]


def _speed(run: dict[str, Any]) -> float:
    speed: float = run["tokens"] / run["seconds"]
    return speed


def attention(results: dict[str, Any]) -> str:
    """Training and reading of mixed lengths, end to end beside padded rows and beside a bare decoder."""
    rows = []
    for (shape, mean, longest), runs in grouped(results["runs"], "shape", "mean", "longest").items():
        speed = {
            way: statistics.median(one["tokens"] / one["seconds"] for one in of)
            for way, of in grouped(runs, "contender").items()
        }
        train, read = speed["train, varlen"], speed["read, varlen"]
        times = train / speed["train, rows"], read / speed["read, rows"], read / speed["bare"], read / speed["headed"]
        named = [shape, f"{mean:,}", f"{longest:,}", f"{train:,.0f}", f"{times[0]:.2f}×", f"{read:,.0f}", f"{times[1]:.2f}×"]
        rows.append([*named, f"{100 * times[2]:.0f}%", f"{100 * times[3]:.0f}%"])
    heads = [
        "models",
        "mean response",
        "longest",
        "training, tokens/s",
        "of padded rows'",
        "reading, tokens/s",
        "of padded rows'",
    ]
    return table([*heads, "of a bare decoder's", "of a decoder's with its head"], rows)


def batching(results: dict[str, Any]) -> str:
    """Writing, continuously and by generate()."""
    names = {"continuous": "npd's continuous batching", "static": "`generate()`"}
    rows = []
    for shape, runs in grouped(results["runs"], "shape").items():
        by = grouped(runs, "way")
        ours = statistics.median(r["tokens"] / r["seconds"] for r in by["continuous"])
        for way, of in by.items():
            speeds = [r["tokens"] / r["seconds"] for r in of]
            rows.append(
                [shape, names.get(way, way), str(len(of)), ranged(speeds, 0), f"{ours / statistics.median(speeds):.1f}×"]
            )
    return table(["models", "way", "turns", "tokens/s", "npd is faster by"], rows)


def ideas(results: dict[str, Any]) -> str:
    """Each way's seconds, and those of the first way over them, turn by turn; compiling apart."""
    rows = []
    for (idea, what), runs in grouped(results["runs"], "idea", "what").items():
        ways = grouped(runs, "how")
        compiling = ways.pop("compiling", [])
        base = ways.get("eager") or next(iter(ways.values()))
        for how, mine in ways.items():
            told = f" (compiled in {sum(r['seconds'] for r in compiling):.0f} s)" if how == "torch.compile" else ""
            ratio = [b["seconds"] / r["seconds"] for b, r in zip(base, mine, strict=True)]
            cells = ["" if mine is base else ranged(ratio, 2) + "×"]
            rows.append([idea, what, how + told, ranged([r["seconds"] for r in mine], 2), *cells])
    return table(["idea", "what", "how", "seconds", "faster by"], rows)


def speed(results: dict[str, Any]) -> str:
    """Seconds of each divergence, and over those of the forward KL on raw top-k in the same turn."""
    by = grouped([r for r in results["runs"] if r["what"] == "speed"], "divergence", "mass")
    base = by["forward_kl", "raw"]

    def cells(name: str, mass: str) -> list[str]:
        runs = by[name, mass]
        ratio = [r["seconds"] / b["seconds"] for r, b in zip(runs, base, strict=True)]
        return [ranged([r["seconds"] for r in runs], 3), ranged(ratio, 2) + "×"]

    names = dict.fromkeys(name for name, _ in by)
    rows = [[f"`{name}`", *cells(name, "raw"), *cells(name, "tail")] for name in names]
    heads = ["`loss.divergence`", "seconds, raw", "to `forward_kl`, raw", "seconds, tail", "to `forward_kl`, raw"]
    return table(heads, rows)


def distance(results: dict[str, Any]) -> str:
    """What a stored top-k says of each divergence over the whole vocabulary."""
    rows = []
    models = grouped([r for r in results["runs"] if r["what"] != "speed"], "what")
    for what, (name, runs) in (
        (what, found) for what, mine in models.items() for found in grouped(mine, "divergence").items()
    ):
        by = {(r["mass"], r["k"]): r for r in runs}
        ks = sorted({r["k"] for r in runs})

        def over_k(mass: str, figure: str, spec: str, by: dict[Any, Any] = by, ks: list[int] = ks) -> str:
            return " / ".join(format(by[mass, k][figure], spec) for k in ks)

        tail, raw = over_k("tail", "top_k", ".3f"), over_k("raw", "top_k", ".3f")
        about = f"{what}; k = {' / '.join(map(str, ks))} hold {over_k('tail', 'held', '.3f')}" if name == "forward_kl" else ""
        rows.append([about, f"`{name}`", f"{runs[0]['whole']:.3f}", tail, over_k("tail", "gradient_away", ".2f")])
        rows[-1] += [raw, over_k("raw", "gradient_away", ".2f")]
    heads = ["models", "`loss.divergence`", "whole vocabulary, nats", "top-k with tail", "its gradient is away"]
    return table([*heads, "top-k raw", "its gradient is away"], rows)


def smollm2(results: dict[str, Any]) -> str:
    """One row an arm: what it took, and what its students are like; median and range over seeds."""
    rows = []
    for runs in grouped(results["runs"], "arm").values():
        figures = [r["figures"] for r in runs]
        took = [""] * 4
        if "seconds" in runs[0]:
            took = [
                str(len(runs)),
                ranged([r["seconds"] for r in runs], 1 if runs[0]["seconds"] < 100 else 0),
                ranged([r["steps"] for r in runs], 0),
                ranged([r["tokens"] / 1000 for r in runs], 0 if runs[0]["tokens"] > 10_000 else 1),
            ]
        rows.append(
            [
                runs[0]["title"],
                *took,
                *(ranged([f[key] for f in figures], 3) for key in ("kl_to_teacher", "reverse_kl_to_teacher")),
                ranged([f["kl on the teacher's text"] for f in figures], 3),
                ranged([f["top1_agreement"] for f in figures], 1, 100),
                ranged([f["accuracy"] for f in figures], 1, 100),
            ]
        )
    heads = [
        "",
        "seeds",
        "seconds",
        "steps",
        "thousand tokens",
        "KL(T‖S)",
        "KL(S‖T)",
        "KL(T‖S), teacher's text",
        "top-1 %",
        "right %",
    ]
    return table(heads, rows)


def smollm2_problems(results: dict[str, Any]) -> str:
    """Right answers, task by task."""
    first = results["runs"][0]["figures"]
    tasks = [key for key in first if key.startswith("accuracy of ")]
    rows = [
        [runs[0]["title"], *(ranged([r["figures"][task] for r in runs], 1, 100) for task in tasks)]
        for runs in grouped(results["runs"], "arm").values()
    ]
    return table(["right %", *(f"`{task.removeprefix('accuracy of ')}`" for task in tasks)], rows)


def smollm2_samples(results: dict[str, Any]) -> str:
    """The greedy answers of the first seed's students to a few held-out prompts."""
    by = list(grouped(results["runs"], "arm").values())
    rows = []
    for number, sample in enumerate(results["runs"][0]["samples"]):
        rows.append([f"**{quoted(sample['prompt'])}**", ""])
        rows += [[runs[0]["title"], quoted(runs[0]["samples"][number]["text"])] for runs in by]
    return table(["", ""], rows)


LONGEST_QUOTE = 240
"""Characters."""


def quoted(text: str) -> str:
    """A model's text for a cell of a table: one line, cut off, and nothing in it is Markdown or HTML."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) > LONGEST_QUOTE:
        line = line[:LONGEST_QUOTE].rstrip() + " …"
    return re.sub(r"[^\w\s.,;:?'…-]", lambda m: f"&#{ord(m[0])};", line).replace("_", "&#95;").replace("www.", "www&#46;")


def prefixes(results: dict[str, Any]) -> str:
    """Whole responses and prefixes, at as many generated tokens and, between two points of a curve, at as many prompts."""
    arms = list(grouped(results["runs"], "share").values())
    whole = {run["seed"]: run for run in arms[0]}

    def at(run: dict[str, Any], axis: str, x: float) -> float:
        return 100 * float(np.interp(x, run[axis], run["accuracy"]))

    def more(runs: Runs, axis: str, parts: Sequence[int]) -> str:
        """Points above whole responses, where those are at these places of their curve."""
        if runs is arms[0]:
            return ""
        each = [
            statistics.fmean(at(run, axis, mine[axis][i]) - 100 * mine["accuracy"][i] for i in parts)
            for run in runs
            for mine in [whole[run["seed"]]]
        ]
        return f"{Mean.of(each):+.1f}"

    rows, last = [], len(arms[0][0]["accuracy"]) - 1
    for runs in arms:
        first = runs[0]["first"]
        rows.append(
            [
                f"first {first} tokens ({runs[0]['share']:.0%})" if first else "whole responses",
                f"{statistics.fmean(run['generated'][-1] for run in runs) / 1000:.0f}",
                f"{statistics.fmean(run['responses'][-1] for run in runs):,.0f}",
                f"{statistics.fmean(run['steps'] for run in runs):.0f}",
                f"{100 * statistics.fmean(run['accuracy'][0] for run in runs):.1f}",
                ", ".join(f"{100 * run['accuracy'][-1]:.1f}" for run in runs),
                more(runs, "generated", [last]),
                more(runs, "generated", range(last // 2 + 1, last + 1)),
                more(runs, "responses", [last]),
                f"{Mean.of([100 * (run['long']['after'] - run['long']['before']) for run in runs]):+.1f}",
            ]
        )
    heads = [
        "loss on",
        "thousand tokens generated",
        "prompts",
        "steps",
        "accuracy before, %",
        "after, by seed",
        "to whole, at equal tokens",
        "the same, second half of the curve",
        "at equal prompts",
        "gained on long problems",
    ]
    return table(heads, rows)


def machine(results: dict[str, Any]) -> str:
    m = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    cores = f"{m['cores']} core{'' if m['cores'] == 1 else 's'}"
    where = f"{m['processor']}, {cores}, {m['memory_gib']} GiB, {'no GPU' if m['gpu'] is None else m['gpu']}"
    return f"{where}; Python {m['python']}, {versions}; {results['date']}."


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "machine": ("distillation", machine),
    "end to end": ("distillation", distillation),
    "quality": ("distillation", quality),
    "stages": ("distillation", stages),
    "end to end, small steps": ("distillation-small", distillation),
    "quality, small steps": ("distillation-small", quality),
    "stages, small steps": ("distillation-small", stages),
    "tails": ("tails", tails),
    "tails, lengths": ("tails", tails_lengths),
    "tails, stages": ("tails", tails_stages),
    "tails, count": ("tails", tails_count),
    "tails, machine": ("tails", machine),
    "batching": ("batching", batching),
    "attention": ("attention", attention),
    "attention, machine": ("attention", machine),
    "tails on a GPU": ("tails-cuda", tails),
    "tails on a GPU, lengths": ("tails-cuda", tails_lengths),
    "tails on a GPU, stages": ("tails-cuda", tails_stages),
    "tails on a GPU, machine": ("tails-cuda", machine),
    "chains": ("chains", distillation),
    "quality, chains": ("chains", quality),
    "stages, chains": ("chains", stages),
    "ideas": ("ideas", ideas),
    "loss": ("loss", loss),
    "loss of many tokens": ("loss-8192", loss),
    "loss, 64": ("loss-64", loss),
    "loss, wide": ("loss-4096", loss),
    "scoring": ("scoring", scoring),
    "stored": ("scoring", stored),
    "packing": ("packing", packing),
    "growth": ("growth", growth),
    "floor": ("floor", floor),
    "divergences' speed": ("divergences", speed),
    "distance": ("divergences", distance),
    "profiles": ("floor", profiles),
    "prefixes": ("prefixes", prefixes),
    "smollm2": ("smollm2", smollm2),
    "smollm2, problems": ("smollm2", smollm2_problems),
    "smollm2, samples": ("smollm2", smollm2_samples),
    "smollm2, machine": ("smollm2", machine),
}


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))


def filled(text: str) -> str:
    """A page with the table of each pair of marks that it has."""
    for name, (file, make) in BLOCKS.items():
        path = RESULTS / f"{file}.json"
        if f"<!-- {name} -->" in text:
            text = between(text, name, make(json.loads(path.read_text())) if path.exists() else "(not measured)")
    return text


if __name__ == "__main__":
    main()
