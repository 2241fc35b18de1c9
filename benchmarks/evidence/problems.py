"""Families of problems: a generator of prompts with worked references, and a verifier that reads a response.

A verifier sees what the generator left in `Problem.check` and the response's text, nothing else; it never raises. Of several
right answers it takes any.
"""

from __future__ import annotations

import functools
import json
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import chains
from npd.demo import task as sums


@dataclass(frozen=True)
class Problem:
    prompt: str
    completion: str | None
    """A right answer with its work; None where the prompt has none."""
    check: str
    """What the verifier needs; empty where nothing is right."""
    stratum: str
    """Which of the family's kinds it is of: figures are given for each."""


@dataclass(frozen=True)
class Family:
    """A kind of task, without models."""

    make: Callable[[random.Random], Problem]
    verify: Callable[[str, str], bool]
    """(check, response) -> is it right?"""
    characters: str
    prompt_tokens: int
    new_tokens: int
    has_strata: bool = False
    """Do training prompts carry their strata as `source`?"""

    @property
    def row(self) -> int:
        return self.prompt_tokens + self.new_tokens


def problems(family: str, count: int, seed: str, *, distinct: bool = True) -> list[Problem]:
    """`count` problems, of different prompts if `distinct`; the same seed gives the same list."""
    rng = random.Random(f"npd-evidence-{family}-{seed}")
    make = FAMILIES[family].make
    if not distinct:
        return [make(rng) for _ in range(count)]
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = make(rng)
        found.setdefault(problem.prompt, problem)
    return list(found.values())


def verified(family: str, check: str, response: str) -> bool:
    return bool(check) and FAMILIES[family].verify(check, response)


def _says(check: str, response: str) -> bool:
    """Does the response end with this text behind its one #?"""
    work, mark, said = response.partition("#")
    return bool(work and mark) and said == check


# -- sums: the demo's chained arithmetic, 4 to 6 dependent steps


def _sum(rng: random.Random) -> Problem:
    value = rng.randrange(100)
    steps = [(rng.choice("+-*"), rng.randint(2, 9)) for _ in range(rng.randint(sums.MIN_STEPS, sums.MAX_STEPS))]
    completion, answer = sums.solve(value, steps)
    prompt = str(value) + "".join(f"{operator}{operand}" for operator, operand in steps) + "="
    return Problem(prompt, completion, str(answer), f"{len(steps)} steps")


# -- chains: 1 to 30 labelled steps, each on the one before


LENGTHS = ((1, 3), (4, 6), (7, 12), (13, 30))


def _chain(rng: random.Random) -> Problem:
    value = rng.randrange(100)
    steps: list[tuple[str, int]] = []
    while not steps or (len(steps) < len(chains.LABELS) and rng.random() > 1 / chains.MEAN_STEPS):
        steps.append((rng.choice("+-*"), rng.randint(2, 9)))
    labelled = zip(chains.LABELS, steps, strict=False)
    prompt = str(value) + "".join(f"{label}{operator}{operand}" for label, (operator, operand) in labelled) + "="
    completion, answer = chains.solve(value, steps)
    low, high = next(ends for ends in LENGTHS if ends[0] <= len(steps) <= ends[1])
    return Problem(prompt, completion, str(answer), f"{low}-{high} steps")


# -- coins: pay a sum with coins of three to five kinds, coin by coin; any way that comes out even is right


_PAID = re.compile(r"(\d+)-(\d)=(\d+);")


def _payable(most: int, kinds: list[int]) -> list[bool]:
    """[most + 1]: which sums can be paid?"""
    can = [True] + [False] * most
    for left in range(1, most + 1):
        can[left] = any(left >= kind and can[left - kind] for kind in kinds)
    return can


def _coins(rng: random.Random) -> Problem:
    """31:479=  31-9=22;22-4=18;18-7=11;11-7=4;4-4=0;"""
    while True:
        total, kinds = rng.randint(12, 45), sorted(rng.sample(range(2, 10), rng.randint(3, 5)))
        if (can := _payable(total, kinds))[total]:
            break
    lines, left = [], total
    while left:
        kind = rng.choice([kind for kind in kinds if kind <= left and can[left - kind]])
        lines.append(f"{left}-{kind}={left - kind};")
        left -= kind
    named = f"{total}:{''.join(map(str, kinds))}"
    return Problem(f"{named}=", "".join(lines), named, f"{len(kinds)} kinds")


def _paid(check: str, response: str) -> bool:
    """Do right subtractions of coins that there are lead from the sum to 0, with nothing between them or behind?"""
    total, kinds = check.split(":")
    left, read = int(total), 0
    while read < len(response):
        step = _PAID.match(response, read)
        if step is None:
            return False
        before, kind, after = step.groups()
        if kind not in kinds or before != str(left) or after != str(left - int(kind)):
            return False
        left, read = left - int(kind), step.end()
    return left == 0


# -- mixed: four skills on strings of digits of 3 to 14, and prompts that ask for nothing that there is


SKILLS: dict[str, tuple[str, Callable[[str], str]]] = {
    "r": ("reverse", lambda text: text[::-1]),
    "s": ("sort", lambda text: "".join(sorted(text))),
    "d": ("double", lambda text: "".join(str(2 * int(c) % 10) for c in text)),
    "c": ("running sum", lambda text: "".join(str(sum(map(int, text[: i + 1])) % 10) for i in range(len(text)))),
}
NONSENSE = 0.25
"""Share of the training prompts without a right answer, as scraped prompts have them."""


def _skill(rng: random.Random) -> Problem:
    """c4829=  4243"""
    skill = rng.choice(list(SKILLS))
    text = "".join(rng.choices(string.digits, k=rng.randint(3, 14)))
    name, act = SKILLS[skill]
    answer = act(text)
    return Problem(f"{skill}{text}=", answer, answer, name)


def _mixed(rng: random.Random) -> Problem:
    problem = _skill(rng)
    if rng.random() >= NONSENSE:
        return problem
    letters = list(problem.prompt[:-1] + rng.choice("rsdc=") * rng.randint(1, 3))
    rng.shuffle(letters)
    return Problem("".join(letters) + "=", None, "", "nonsense")


# -- of reasoning-gym, asked in few characters: its entries, its verifiers


@functools.cache
def _gym(name: str, options: str = "{}") -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1 << 20, seed=0, **json.loads(options))


SORTING = json.dumps(
    {"min_numbers": 3, "max_numbers": 8, "min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 99}
)
SPELLING = json.dumps({"min_length": 5, "max_length": 10})


def _sorting(rng: random.Random) -> Problem:
    """<56 25 75=  25 56 75"""
    entry = _gym("number_sorting", SORTING)[rng.randrange(1 << 20)]
    about = entry["metadata"]
    numbers, right = ([str(int(float(n))) for n in about[key]] for key in ("original_numbers", "sorted_numbers"))
    sign = "<" if about["direction"] == "ascending" else ">"
    check = json.dumps({"answer": entry["answer"], "metadata": about})
    return Problem(f"{sign}{' '.join(numbers)}=", " ".join(right), check, f"{len(numbers) // 3 * 3} numbers and more")


def _is_sorted(check: str, response: str) -> bool:
    if not re.fullmatch(r"\d{1,2}( \d{1,2})*", response):
        return False
    entry = json.loads(check)
    numbers = [f"{number}.0" for number in response.split(" ")]
    if sorted(numbers) != sorted(entry["metadata"]["original_numbers"]):  # reasoning-gym allows each to be off by one
        return False
    return _marks("number_sorting", SORTING, str(numbers), entry)


def _palindrome(rng: random.Random) -> Problem:
    """oubuob=  obuubo: of many, one at random"""
    entry = _gym("palindrome_generation", SPELLING)[rng.randrange(1 << 20)]
    letters = entry["metadata"]["letters"]
    check = json.dumps({"answer": entry["answer"], "metadata": {"letters": letters}})
    return Problem("".join(letters) + "=", entry["answer"], check, f"{len(letters)} letters")


def _is_palindrome(check: str, response: str) -> bool:
    return _marks("palindrome_generation", SPELLING, response, json.loads(check))


def _marks(name: str, options: str, said: str, entry: Any) -> bool:
    """Full marks by reasoning-gym's own verifier; part marks, which some give for a format, are no solution."""
    try:
        return bool(_gym(name, options).score_answer(said, entry) >= 1.0)
    except Exception:  # verifiers parse, and a model may write anything
        return False


FAMILIES: dict[str, Family] = {
    "sums": Family(_sum, _says, sums.CHARACTERS, 20, 72),
    "chains": Family(_chain, _says, sums.CHARACTERS + chains.LABELS, chains.PROMPT_TOKENS, chains.NEW_TOKENS),
    "sorting": Family(_sorting, _is_sorted, string.digits + " <>=", 28, 26),
    "coins": Family(_coins, _paid, string.digits + "-=;:", 12, 130),
    "mixed": Family(_mixed, lambda check, response: check == response, string.digits + "rsdc=", 24, 24, has_strata=True),
    "palindromes": Family(_palindrome, _is_palindrome, string.ascii_lowercase + "=", 16, 16),
}
