"""The demo's task: chained arithmetic modulo 100, one step a line of thought.

    prompt      47+8*3-9=
    completion  47+8=55;55*3=65;65-9=56;#56

Operators apply strictly from left to right and every result is taken modulo 100. Each step is a fact out of
2,400 (100 values, 3 operators, 8 operands), so a small model knows some and not others, and one wrong step spoils
the answer: accuracy falls off smoothly with skill, which is what a comparison of training methods needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CHARACTERS = "0123456789+-*=;#"
MIN_STEPS, MAX_STEPS = 4, 6


@dataclass(frozen=True)
class Problem:
    prompt: str
    completion: str
    answer: str


def solve(value: int, steps: list[tuple[str, int]]) -> tuple[str, int]:
    """The worked solution of a chain, and its answer in 0..99."""
    lines = []
    for operator, operand in steps:
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 100
        lines.append(f"{value}{operator}{operand}={result};")
        value = result
    return "".join(lines) + f"#{value}", value


def make_problems(count: int, seed: int) -> list[Problem]:
    """`count` different problems; the same seed gives the same list."""
    rng = random.Random(f"npd-demo-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        value = rng.randrange(100)
        steps = [(rng.choice("+-*"), rng.randint(2, 9)) for _ in range(rng.randint(MIN_STEPS, MAX_STEPS))]
        prompt = str(value) + "".join(f"{operator}{operand}" for operator, operand in steps) + "="
        completion, answer = solve(value, steps)
        problems.setdefault(prompt, Problem(prompt, completion, str(answer)))
    return list(problems.values())
