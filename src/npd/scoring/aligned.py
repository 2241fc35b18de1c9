"""A teacher with another tokenizer: it reads a response's bytes as its own tokens, and answers in the student's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from npd.config import ModelConfig, Sampling, TeacherConfig
from npd.errors import RunError, UserError, foreign
from npd.models import (
    PROBES,
    Span,
    TokenBytes,
    Vocabulary,
    load_model_config,
    load_tokenizer,
    shared_vocabulary,
    stop_ids_of,
)
from npd.models.token_bytes import is_text
from npd.prompts import turn_end
from npd.scoring import Advance, Identity, Question, Teacher, TeacherSetting, check_asked, teacher_kind
from npd.scoring.alignment import NONE, align, carry, token_logprobs
from npd.scoring.contexts import as_read
from npd.scoring.distance import Distance
from npd.scoring.health import Health, wrong_readings
from npd.scoring.prefill import AlignedReading, Prefill, Reading
from npd.store.schema import add_answers


class Side:
    """A model's tokens, and which of them end a response; `stop` is the one that it writes itself there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], name: str = "") -> None:
        end = turn_end(tokenizer).token
        self.tokens, self.stop_ids = TokenBytes(tokenizer, name), frozenset(stop_ids)
        self.stop = int(tokenizer.eos_token_id if end is None else end)
        self._named = {text: id_ for id_, text in self.tokens.specials.items() if text}

    def special(self, token: int) -> bool:
        """Does it stand for no bytes?"""
        pieces = self.tokens.pieces
        return token in self.stop_ids or token >= len(pieces) or not pieces[token]

    def named(self, other: Side, token: int) -> int:
        """The special token of this side that means what one of the other side does; NONE: there is none."""
        mine = self._named.get(other.tokens.specials.get(token, ""), NONE)
        if token in other.stop_ids and mine not in self.stop_ids:
            return self.stop
        return mine


class Bridge:
    """Two tokenizers over the same bytes.

    Attributes:
        image: [V] for each of the teacher's tokens, the student's that it is written with, or first; NONE: there is none.
        same: [V] bool: is it that one alone?
    """

    def __init__(self, student: Side, teacher: Side, size: int) -> None:
        self.student, self.teacher = student, teacher
        ours, theirs = student.tokens, teacher.tokens
        self.one = ours.words == theirs.words and all(
            ours.encode([text.encode()]) == theirs.encode([text.encode()]) for text in PROBES
        )
        vocabulary = {word: id_ for id_, word in enumerate(ours.words) if word is not None}
        self.image = np.full(len(theirs), NONE, np.int64)
        self.same = np.zeros(len(theirs), bool)
        spelled = []
        for id_, piece in enumerate(theirs.pieces):
            if id_ in theirs.specials or id_ in teacher.stop_ids:
                self.image[id_], self.same[id_] = student.named(teacher, id_), True
            elif piece:
                namesake = vocabulary.get(theirs.words[id_] or "", NONE)
                if namesake == NONE or ours.pieces[namesake] != piece:
                    namesake = ours.id_of.get(piece, NONE)
                if namesake != NONE:
                    self.image[id_], self.same[id_] = namesake, True
                elif is_text(piece):
                    spelled.append(id_)
        for id_, spans in zip(spelled, ours.encode([theirs.pieces[id_] or b"" for id_ in spelled]), strict=True):
            if spans and spans[0].start == 0:
                self.image[id_] = spans[0].token
        outside = self.image >= size
        self.image[outside], self.same[outside] = NONE, False

    def cross(self, responses: Sequence[Sequence[int]]) -> list[tuple[list[Span], list[Span]]]:
        """A response's tokens and those that the teacher reads instead, as spans over the same bytes.

        A special token takes a place of its own. The teacher does not see those that mean nothing to it.
        """
        pieces = self.student.tokens.pieces
        texts: list[bytes] = []  # between special tokens
        plans: list[tuple[list[Span], list[tuple[int, int | Span]]]] = []
        for response in responses:
            at, text, spans, plan = 0, b"", list[Span](), list[tuple[int, int | Span]]()
            for token in response:
                if self.student.special(token):
                    if text:
                        plan.append((at - len(text), len(texts)))
                        texts.append(text)
                        text = b""
                    if (theirs := self.teacher.named(self.student, token)) != NONE:
                        plan.append((at, Span(theirs, 0, 1)))
                    size = 1
                else:
                    piece = pieces[token] or b""
                    text, size = text + piece, len(piece)
                spans.append(Span(token, at, at + size))
                at += size
            if text:
                plan.append((at - len(text), len(texts)))
                texts.append(text)
            plans.append((spans, plan))
        if self.one:
            return [(spans, spans) for spans, _ in plans]
        read = self.teacher.tokens.encode(texts)
        return [
            (
                spans,
                [
                    Span(span.token, at + span.start, at + span.end)
                    for at, what in plan
                    for span in ([what] if isinstance(what, Span) else read[what])
                ],
            )
            for spans, plan in plans
        ]

    def back(self, written: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
        """What the teacher wrote, in the student's tokens, at most `longest` of them; its stop token is the student's."""
        texts = [self.teacher.tokens.join([t for t in ids if not self.teacher.special(t)]) for ids in written]
        answers = []
        for ids, spans in zip(written, self.student.tokens.encode(texts), strict=True):
            ours = [span.token for span in spans]
            if ids and ids[-1] in self.teacher.stop_ids:
                ours.append(self.student.named(self.teacher, ids[-1]))
            answers.append(ours[:longest] or [self.student.stop])
        return answers


class AlignedTeacher(Teacher):
    """Wraps a teacher of another kind.

    Contexts that it is given are in its own tokens (the column `TEACHER_PROMPT`), responses in the student's, and so is what
    it says of them. `vocabulary` is the student's, but for the token that a response without a prompt is read behind.
    """

    def __init__(self, config: TeacherConfig, setting: TeacherSetting) -> None:
        super().__init__(config, setting)
        assert setting.student is not None, "a run's teachers are told of its student"
        self.health = Health(tokens=None)
        inner = without_align(config)
        tokenizer = own_tokenizer(config)
        self.inside = own_vocabulary(config, tokenizer)
        pad = int(self.inside.stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        start = setting.start_engine and partial(setting.start_engine, vocabulary=self.inside, pad_id=pad)
        own = replace(setting, vocabulary=self.inside, pad_id=pad, start_engine=start)
        self.inner: Teacher = teacher_kind(inner)(inner, own)
        self.vocabulary = replace(setting.vocabulary, start_id=self.inside.start_id)
        ours = Side(load_tokenizer(setting.student), setting.vocabulary.stop_ids)
        self.bridge = Bridge(ours, Side(tokenizer, self.inside.stop_ids, config.model), setting.vocabulary.size)

    @classmethod
    def suits(cls, config: TeacherConfig) -> bool:
        return config.align

    @classmethod
    def runs_elsewhere(cls, config: TeacherConfig) -> bool:
        inner = without_align(config)
        return teacher_kind(inner).runs_elsewhere(inner)

    @classmethod
    def identify(cls, config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, student: str) -> Identity:
        """As `Teacher.identify`; of another tokenizer, what its tokens' bytes are must be known."""
        TokenBytes(tokenizer, student)
        theirs = own_tokenizer(config)
        TokenBytes(theirs, config.model)
        inner = without_align(config)
        known = teacher_kind(inner).identify(inner, theirs, config.model)
        return known._replace(tokenizer=theirs, aligned=True)

    @classmethod
    def check(cls, config: TeacherConfig, identity: Identity, question: Question) -> list[str]:
        inner, own = without_align(config), own_vocabulary(config, own_tokenizer(config))
        for size, whose in ((own.size, "it"), (question.vocabulary.size, "the student")):
            if question.top_k >= size:
                raise UserError(
                    f"scoring.top_k is {question.top_k}, but with the aligned teacher {config.model} {whose} has only {size} "
                    "tokens, and some must be left for the rest. Lower scoring.top_k."
                )
        assert identity.tokenizer is not None, "it has one of its own"
        lost = unreadable(TokenBytes(question.tokenizer), TokenBytes(identity.tokenizer, config.model))
        asked = replace(question, tokenizer=identity.tokenizer, vocabulary=own, own=True)
        check_asked(teacher_kind(inner), inner, asked)
        return lost + teacher_kind(inner).check(inner, identity, asked)

    @classmethod
    def plan(cls, config: TeacherConfig, identity: Identity) -> str:
        inner = without_align(config)
        size = len(identity.tokenizer.get_vocab()) if identity.tokenizer is not None else 0
        return f"{teacher_kind(inner).plan(inner, identity)}; aligned by bytes, with {size:,} tokens of its own"

    def read(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Advance | None = None,
    ) -> list[Reading]:
        """As `Teacher.read`, contexts in the teacher's tokens; a place of the top-k with -inf holds nothing.

        What is behind the teacher's context is left out.
        """
        crossed = self.bridge.cross(responses)
        most = self.inner.context()
        asked: list[list[Span]] = []
        for context, (_, theirs) in zip(contexts, crossed, strict=True):
            asked.append(theirs if most is None else theirs[: max(0, most - len(context))])
        rows = [i for i, theirs in enumerate(asked) if theirs]
        ids = [[span.token for span in asked[i]] for i in rows]
        advance = None if progress is None else _Scaled(progress, sum(map(len, responses)), sum(map(len, ids)))
        read = self.inner.read([contexts[i] for i in rows], ids, top_k, advance) if rows else []
        wrong = wrong_readings(read, [len(each) for each in ids], top_k, self.inside.size)
        if wrong is not None:
            raise RunError(f"The teacher {self.config.model} reads what no model can: {wrong}. Nothing of it is kept.")
        of = dict(zip(rows, read, strict=True))
        nothing = Reading(np.zeros(0, np.float32), np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float32))
        pairs = enumerate(zip(crossed, asked, strict=True))
        return [self._reading(spans, theirs, of.get(i, nothing)) for i, ((spans, _), theirs) in pairs]

    def _reading(self, ours: list[Span], theirs: list[Span], said: Reading) -> Reading:
        alignment = align(ours, theirs)
        labels, read = (np.array([span.token for span in spans], np.int64) for spans in (ours, theirs))
        ids, values = carry(
            alignment,
            labels,
            read,
            said.logprobs,
            said.topk_ids.astype(np.int64),
            said.topk_logprobs,
            self.bridge.image,
            self.bridge.same,
            self.vocabulary.size,
        )
        own = token_logprobs(alignment, said.logprobs).astype(np.float32)
        return AlignedReading.of(Reading(own, ids, values), alignment.kinds)

    def write(self, table: pa.Table, sampling: Sampling, seed: int = 0, progress: Advance | None = None) -> pa.Table:
        asked = table.set_column(table.column_names.index("prompt_ids"), "prompt_ids", as_read(table))
        written = self.inner.write(asked, sampling, seed, progress)["response_ids"].to_pylist()
        return add_answers(table, self.bridge.back(written, sampling.max_new_tokens), self.vocabulary.stop_ids)

    def distance(
        self,
        student: Prefill,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int,
        told: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Distance]:
        raise UserError(f"The KL to {self.config.model} is not defined: its tokenizer is another one than the student's.")

    def context(self) -> int | None:
        return self.inner.context()

    def move(self, device: str) -> None:
        self.inner.move(device)

    def rest(self) -> None:
        self.inner.rest()

    def stop(self) -> None:
        self.inner.stop()

    def close(self) -> None:
        self.inner.close()


class _Scaled:
    """Tells of the student's tokens where the teacher's are counted."""

    def __init__(self, tell: Advance, ours: int, theirs: int) -> None:
        self.tell, self.ours, self.theirs = tell, ours, max(1, theirs)
        self.read = self.told = 0

    def __call__(self, count: int) -> None:
        self.read += count
        now = self.ours * self.read // self.theirs
        self.tell(now - self.told)
        self.told = now


def unreadable(student: TokenBytes, teacher: TokenBytes) -> list[str]:
    """See that a teacher can read what the student may write; what of it the teacher does not see, for the user.

    Raises:
        UserError: its tokenizer changes letters or digits, as one does that makes all text lower-case: it was never shown
            what the student writes.
    """
    alphabet = student.alphabet()
    plain = [char for char in alphabet if char.isascii() and char.isalnum()]
    if changed := [char for char, other in zip(plain, teacher.changes(plain), strict=True) if other]:
        raise UserError(
            f"The tokenizer of {teacher.name} reads other letters than the student writes "
            f"({foreign(' '.join(changed[:5]), 60)} and the like become something else, such as lower case), so what the "
            "teacher says would not be of the student's text.",
            "Choose a teacher whose tokenizer keeps a text as it is.",
        )
    read = teacher.encode([char.encode() for char in alphabet])
    lost = [
        char for char, spans in zip(alphabet, read, strict=True) if sum(s.end - s.start for s in spans) < len(char.encode())
    ]
    if not lost:
        return []
    lost.sort(key=lambda char: not (char.isascii() and (char.isprintable() or char.isspace())))  # common ones first
    shown = foreign(", ".join(repr(char) for char in lost[:5]), 60)
    return [
        f"The tokenizer of {teacher.name} has no tokens for {len(lost):,} of the {len(alphabet):,} characters that the "
        f"student may write ({shown}{', ...' if len(lost) > 5 else ''}): the teacher reads responses without them, and where "
        "they stand the student learns from its own label alone."
    ]


def without_align(config: TeacherConfig) -> TeacherConfig:
    """The teacher that is wrapped."""
    plain = config.model_copy(update={"align": False})
    return plain.model_copy(update={"kind": None}) if teacher_kind(plain) is AlignedTeacher else plain


def own_tokenizer(config: TeacherConfig) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer.

    Raises:
        UserError: it is served, and nothing says where its tokenizer lies.
    """
    if config.server is None:
        return load_tokenizer(config)
    if config.tokenizer is None:
        raise UserError(
            f"teacher.align reads responses with the tokenizer of {config.model}, but nothing says where it lies.",
            "Set teacher.tokenizer to a directory or Hub id that has it, chat template included.",
        )
    return load_tokenizer(ModelConfig(model=config.tokenizer))


def own_vocabulary(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What teacher and its own tokenizer share."""
    if config.server is None:
        return shared_vocabulary(tokenizer, load_model_config(config), stop_ids=stop_ids_of(config))
    stops = sorted({int(token) for token in (tokenizer.eos_token_id, turn_end(tokenizer).token) if token is not None})
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Vocabulary(1 + max(tokenizer.get_vocab().values()), tuple(stops), int(start))
