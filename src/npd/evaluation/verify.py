"""Does a response hold the right answer?"""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_MARKED = (
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"(?:#{4}\s*|#(?=[^\s#]))([^\n#]+)"),  # GSM8K's mark and the demo's, but no Markdown heading
    re.compile(r"answer(?:\s+is)?\s*[:=]?\s*\**([^\n*]+)", re.IGNORECASE),
)


def extract_answer(text: str) -> str:
    """The final answer of a response: in <answer> tags, in \\boxed{}, behind # or "answer:", else its last line."""
    for pattern in _MARKED:
        found = pattern.findall(text)
        if found:
            return found[-1].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def is_correct(response: str, answer: str) -> bool:
    """Compare a response's final answer with the right one: as numbers if that is one, else as text."""
    said, right = extract_answer(response), _number(answer)
    if right is None:
        return _plain(said) == _plain(answer)
    numbers = _NUMBER.findall(said)
    return bool(numbers) and _number(numbers[-1]) == right


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip().rstrip(".").replace(",", "").lstrip("$"))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None  # Decimal takes words such as "infinity" and "nan"


def _plain(text: str) -> str:
    return " ".join(text.strip().rstrip(".").casefold().split())


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k responses is right: 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
