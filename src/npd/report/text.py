"""Text that others wrote, made harmless for each place it is shown in."""

from __future__ import annotations

import html
import json
import re
from typing import Any

# What is not seen, or changes how its neighbours are seen: controls but tab and newline, bidirectional marks and overrides,
# the zero-width space (joiners are part of words and of emoji),
# line and paragraph separators, unpaired surrogates, the byte order mark.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Unseen characters by their code points, such as ⟨U+202E⟩; the result can be encoded as UTF-8."""
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


LONG_WORD = 16  # characters: more than a column of a wide table has room for


def long_worded(text: str) -> bool:
    """Has it a word that may have to be broken?"""
    return any(len(word) > LONG_WORD for word in text.split())


def plot_text(text: str) -> str:
    """Text for a label of plotly, which reads markup; long ones are cut."""
    text = visible(" ".join(text.split()))
    return html.escape(text if len(text) <= 60 else f"{text[:59]}…", quote=False)


def island(value: Any) -> str:
    """JSON in ASCII that may stand between any two tags: no markup can end or begin in it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
