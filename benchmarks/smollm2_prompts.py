"""What benchmarks/smollm2 asks: everyday instructions, and easy problems of reasoning-gym.

Held-out prompts are about other topics than those that are trained on, and other problems.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import reasoning_gym

INSTRUCTIONS = Path("examples/instructions.jsonl")

FORMS = (
    "Write one sentence about {}.",
    "Explain in two sentences what is special about {}.",
    "Describe {} to a child of five.",
    "Write a two-line poem about {}.",
    "What is the first thing that comes to mind about {}, and why?",
    "Give three words that go with {}.",
    "Ask a good question about {}.",
    "Name one advantage and one disadvantage of {}.",
    "Why do people like {}?",
    "Write a short message to a friend about {}.",
    "Tell a very short story about {}.",
    "Give one piece of advice about {}.",
    "Write a title for an article about {}.",
    "What should a beginner know about {}?",
    "How would you describe {} in ten words?",
    "Summarise in one sentence why {} matters.",
)
_TOPICS = """
rain, a garden, the sea, old books, a train journey, bread, mountains, a bicycle, winter, coffee, the moon, a market,
music, a letter, horses, a bridge, painting, the desert, a lighthouse, tea, chess, a rainbow, the harvest, a violin,
apples, a long walk, a storm, sleep, a museum, friendship, the night sky, a kitchen, birds, a birthday, rivers, a clock,
snow, a school, fishing, dancing, a village, honey, a map, swimming, a camera, forests, a neighbour, soup, an island,
patience, a doctor, cats, the wind, a newspaper, running, a candle, wool, a ship, spring, the telephone, a farm,
chocolate, silence, a hospital, football, potatoes, a dream, wood, dogs, a library, the sun, a holiday, bees, a theatre,
glass, a grandmother, electricity, a puzzle, salt, a robot
"""
TOPICS = tuple(" ".join(_TOPICS.split()).split(", "))
PROBLEMS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 1, "max_value": 12},
}
"""Tasks with options that leave them so easy that the teacher can do some of each."""

HELD_OUT = 5
"""Each so many-th topic and instruction is held out."""
SHARE = 4
"""Each so many-th prompt that is trained on is a problem."""


APART = 1_000_000


def instructions(*, held_out: bool) -> list[str]:
    """All instructions of one side, in an order that is always the same."""
    given = [json.loads(line)["instruction"] for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    mine = [text for i, text in enumerate(given) if (i % HELD_OUT == 0) == held_out]
    topics = [topic for i, topic in enumerate(TOPICS) if (i % HELD_OUT == 0) == held_out]
    mine += [form.format(topic) for form in FORMS for topic in topics]
    if not held_out:
        others = set(instructions(held_out=True))
        mine = [text for text in mine if text not in others]
    random.Random(0).shuffle(mine)
    return mine


def problems(seed: int, each: int) -> list[dict[str, str]]:
    """So many problems of each task: {task, prompt, answer}."""
    made = []
    for task, options in PROBLEMS.items():
        # reasoning-gym makes problem i of a seed as problem 0 of seed + i
        dataset = reasoning_gym.create_dataset(task, size=each, seed=APART * seed, **options)
        made += [{"task": task, "prompt": entry["question"], "answer": entry["answer"]} for entry in dataset]
    return made


def trained_on(seed: int, count: int) -> list[str]:
    """So many different prompts, a problem among each `SHARE` of them, in random order."""
    language = instructions(held_out=False)
    random.Random(seed).shuffle(language)
    asked = {row["prompt"] for row in held_out_problems(HELD_OUT_PROBLEMS)}
    wanted = min(count // SHARE, count)
    tried = [row["prompt"] for row in problems(seed + 1, 4 * wanted + 8)]
    random.Random(seed).shuffle(tried)
    chosen = [prompt for prompt in dict.fromkeys(tried) if prompt not in asked][:wanted]
    mixed = language[: count - len(chosen)] + chosen
    random.Random(seed).shuffle(mixed)
    return mixed


HELD_OUT_PROBLEMS = 64
"""Of each task, at most."""


def held_out_problems(each: int) -> list[dict[str, str]]:
    """The first so many different ones of each task, which are never trained on."""
    by_task: dict[str, dict[str, dict[str, str]]] = {task: {} for task in PROBLEMS}
    for row in problems(0, 4 * HELD_OUT_PROBLEMS):
        by_task[row["task"]].setdefault(row["prompt"], row)
    return [row for rows in by_task.values() for row in list(rows.values())[: min(each, HELD_OUT_PROBLEMS)]]
