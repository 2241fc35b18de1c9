"""Write the prompts of examples/smollm2.yaml: instructions that ship beside this file, and reasoning-gym problems.

python examples/smollm2_prompts.py [--out runs/smollm2-data] [--problems 48]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import reasoning_gym

INSTRUCTIONS = Path(__file__).with_name("instructions.jsonl")
TASKS = ("chain_sum", "basic_arithmetic", "simple_equations", "number_sorting", "spell_backward", "letter_counting")
HELD_OUT = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2-data"))
    parser.add_argument("--problems", type=int, default=48)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines():
        rows.append(message(json.loads(line)["instruction"], "instructions"))
    for task in TASKS:
        for entry in reasoning_gym.create_dataset(task, size=args.problems // len(TASKS), seed=0):
            rows.append(message(entry["question"], "reasoning-gym"))
    random.Random(0).shuffle(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("eval", rows[:HELD_OUT]), ("train", rows[HELD_OUT:])):
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"{len(part)} prompts in {path}")


def message(text: str, source: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "source": source}


if __name__ == "__main__":
    main()
