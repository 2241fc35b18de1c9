"""Data in: files and Hugging Face datasets to token ids.

Conventions are those TRL's users know: `prompt` (a string or messages) with optional `completion`, `answer`, `source` and
`tools`; or `messages`, whose last assistant turn is the completion. `readers` gives rows, `layouts` what they say,
`templates` how a model reads and writes it, `load` the table.
"""

from npd.prompts.layouts import answer_cell
from npd.prompts.load import load_prompts, read_data
from npd.prompts.readers import SUFFIXES
from npd.prompts.table import (
    ENTRY,
    SCHEMA,
    SEPARATOR,
    TEACHER_PROMPT,
    Prompts,
    accepted_answers,
    count_sources,
    reasoning_gym_entry,
    verifiable,
)
from npd.prompts.teachers import OwnChat
from npd.prompts.templates import Chat, TurnEnd, turn_end

__all__ = [
    "ENTRY", "SCHEMA", "SEPARATOR", "SUFFIXES", "TEACHER_PROMPT",
    "Chat", "OwnChat", "Prompts", "TurnEnd", "accepted_answers", "answer_cell", "count_sources", "load_prompts", "read_data",
    "reasoning_gym_entry",
    "turn_end", "verifiable",
]  # fmt: skip
