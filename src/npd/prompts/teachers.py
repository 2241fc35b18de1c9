"""What a teacher reads in place of the student's prompt: hints, a reference answer, a system prompt, template options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npd.config import Config, TeacherConfig
from npd.errors import UserError, foreign
from npd.prompts.fields import Message
from npd.prompts.layouts import Row
from npd.prompts.templates import Asked, Chat

OwnChat = Callable[[str], Chat | None]
"""The teacher's own, for prompts of a source; None where it reads with the student's tokenizer."""


class TeacherPrompts:
    """Renders each row's prompt as the teacher of its source reads it.

    That is the row's `teacher_prompt`, or else its prompt, with `system` and `template_options` of that teacher; in the
    student's own format, as the response is that of the student, but for a teacher with another tokenizer, which has its own.

    Attributes:
        own: of teachers with another tokenizer.
        readers: those that were met, by source.

    Raises:
        UserError: a teacher has options that the chat template knows nothing of.
    """

    def __init__(self, config: Config, chat: Chat, own: OwnChat | None = None) -> None:
        self.config, self.chat, self.own = config, chat, own
        self.readers: dict[str, Chat] = {}
        for key, teacher in self._telling.items():
            name = "teacher" if key is None else f"teachers.{key}"
            given = "system" if teacher.system is not None else "template_options"
            reader = (own(key or "") if own is not None and teacher.align else None) or chat
            whose = "teacher's own" if reader is not chat else "student's"
            if not reader.template:
                raise UserError(
                    f"{name}.{given} goes through the {whose} chat template, and that tokenizer has none.",
                    "Give the teacher's prompts in the data's column teacher_prompt.",
                )
            if unknown := reader.unknown(teacher.template_options):
                raise UserError(
                    f"{name}.template_options has {foreign(', '.join(unknown), 200)}, but the {whose} tokenizer has a chat "
                    "template that knows nothing of it."
                )

    @property
    def _telling(self) -> dict[str | None, TeacherConfig]:
        return {key: teacher for key, teacher in self.config.given_teachers.items() if teacher.tells_more}

    @property
    def facts(self) -> dict[str, Any]:
        """What the teachers' ids follow from besides the data; nothing where no teacher reads otherwise by its options."""
        told = {key or "": [each.system, each.template_options] for key, each in self._telling.items()}
        return {"teachers": told} if told else {}

    def ask(self, row: Row, asked: Asked) -> tuple[list[int] | None, list[str]]:
        """The ids that the teacher reads in front of the response, and remarks; None: the student's own.

        Raises:
            UserError: the template does not take the teacher's prompt, or leaves a part out.
        """
        teacher = self.config.given_teachers.get(self.config.teacher_of(row.source))
        prompt = row.prompt if row.teacher_prompt is None else row.teacher_prompt
        reader = None if self.own is None else self.own(row.source)
        if reader is not None:
            self.readers.setdefault(row.source, reader)
        elif teacher is None or (row.teacher_prompt is None and not teacher.tells_more):
            return None, []
        if teacher is not None and teacher.system is not None:
            if isinstance(prompt, str):
                raise UserError(
                    f"{row.where}: a prompt that is a string cannot show teacher.system.", "Give messages, or leave it out."
                )
            prompt = behind_system(teacher.system, prompt)
        options = {**(row.options or {}), **(teacher.template_options if teacher is not None else {})}
        try:
            tools = None if isinstance(prompt, str) else row.tools
            read, remarks = (reader or self.chat).ask(row.where, prompt, tools, options or None)
        except (TypeError, ValueError) as error:  # of the tokenizer, as in render_row
            raise UserError(f"{row.where} can't be turned into tokens: {foreign(error)}") from error
        except UserError as error:
            raise UserError(f"The teacher's prompt: {error.what}", error.remedy) from error
        return (None if reader is None and read.ids == asked.ids else read.ids), remarks


def behind_system(system: str, messages: list[Message]) -> list[Message]:
    """Messages with a system prompt in front; a row's own stands behind it, in the same message."""
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    own = first["content"]
    both: Any = f"{system}\n\n{own}" if isinstance(own, str) else [{"type": "text", "text": system}, *own]
    return [{**first, "content": both}, *messages[1:]]
