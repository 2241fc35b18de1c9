"""Data in: files and Hugging Face datasets to token ids.

Conventions are those TRL's users know: `prompt` (a string or messages) with optional `completion`, `answer`, `source` and
`tools`; or `messages`, whose last assistant turn is the completion. `readers` gives rows, `layouts` what they say,
`templates` how a model reads and writes it, `load` the table.
"""

from npd.prompts.load import OwnChat, load_prompts, read_data
from npd.prompts.readers import SUFFIXES
from npd.prompts.table import OWN_PROMPT, SCHEMA, Prompts, accepted_answers, count_sources
from npd.prompts.templates import Chat, TurnEnd, turn_end

__all__ = [
    "OWN_PROMPT", "SCHEMA", "SUFFIXES", "Chat", "OwnChat", "Prompts", "TurnEnd", "accepted_answers", "count_sources",
    "load_prompts", "read_data", "turn_end",
]  # fmt: skip
