"""What a teacher reads in front of each response, where that is another prompt than the student's."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from npd.prompts.table import TEACHER_PROMPT

STUDENT_PROMPT = "student_prompt_ids"  # while prompt_ids are the teacher's


def teacher_contexts(table: pa.Table) -> list[list[int]]:
    """Each row's context as its teacher reads it: teacher_prompt_ids, or where there are none prompt_ids."""
    contexts: list[list[int]] = as_read(table).to_pylist()
    return contexts


def written_behind(table: pa.Table, write: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """What `write` answers to the prompts as teachers read them; the answered table has the student's prompts again."""
    if TEACHER_PROMPT not in table.column_names:
        return write(table)
    asked = table.append_column(STUDENT_PROMPT, table["prompt_ids"])
    place = asked.schema.get_field_index("prompt_ids")
    answered = write(asked.set_column(place, asked.schema.field(place), as_read(table)))
    return answered.set_column(place, answered.schema.field(place), answered[STUDENT_PROMPT]).drop_columns(STUDENT_PROMPT)


def as_read(table: pa.Table) -> pa.ChunkedArray:
    """[N] ids of what teachers read in front of the responses."""
    if TEACHER_PROMPT not in table.column_names:
        return table["prompt_ids"]
    return pc.coalesce(table[TEACHER_PROMPT], table["prompt_ids"])
