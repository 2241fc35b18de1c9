"""A tokenizer seen as what it writes: the bytes of each token, and tokens for any bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from npd.errors import UserError, foreign
from npd.models.tokens import PROBES

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"
LEADS = ("", "\n", ".", "a", "0", "#")
"""What may stand before a text that a tokenizer would else put a space before; it must stay a token of its own."""
TRIED = ("a", " a", "1", ".", "\n", "é", "你")
SAMPLE = 200  # tokens whose bytes are compared with what the tokenizer itself writes


class Span(NamedTuple):
    """A token and the bytes of a text that it stands for."""

    token: int
    start: int
    end: int


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    Attributes:
        pieces: [V] what each id writes; None for ids of special tokens, and for those that stand for nothing.
        words: [V] how the vocabulary names it.
        specials: special tokens by id.
        id_of: bytes -> the id that writes them; of several, that of an ordinary token.

    Raises:
        UserError: how its tokens become bytes is not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        self.tokenizer, self.name = tokenizer, foreign(name or tokenizer.name_or_path, 200)
        vocabulary = tokenizer.get_vocab()
        added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.update(tokenizer.all_special_ids)
        size = 1 + max([*vocabulary.values(), *added])
        scheme = _scheme(tokenizer)
        if scheme is None:
            raise self._unknown()
        self.words: list[str | None] = [None] * size
        for name_, id_ in vocabulary.items():
            self.words[id_] = name_
        self.pieces: list[bytes | None] = [None] * size
        self.specials: dict[int, str] = {}
        for id_, word in enumerate(self.words):
            if id_ in special:
                self.specials[id_] = added.get(id_, word or "")
            elif id_ in added:
                self.pieces[id_] = added[id_].encode()
            elif word is not None:
                self.pieces[id_] = _piece(word, scheme)
        self.id_of: dict[bytes, int] = {}
        order = sorted(range(size), key=lambda id_: (bool(BYTE.fullmatch(self.words[id_] or "")), id_ in added, id_))
        for id_ in order:
            piece = self.pieces[id_]
            if piece:
                self.id_of.setdefault(piece, id_)
        self._longest = max(map(len, self.id_of), default=0)
        self._lead = ""
        if not self._writes_these(set(added)):
            raise self._unknown()
        self._lead = self._find_lead()

    def _unknown(self) -> UserError:
        return UserError(
            f"How the tokens of {self.name} become bytes is not known ({type(self.tokenizer).__name__}), so they can't be "
            "aligned with those of another tokenizer.",
            "Choose a model whose tokenizer is a byte-level or SentencePiece BPE, or a unigram, in tokenizer.json.",
        )

    def _writes_these(self, added: set[int]) -> bool:
        """Are the pieces what the tokenizer itself makes of tokens? In front it may leave spaces out."""
        plain = [
            id_ for id_, piece in enumerate(self.pieces)
            if piece and id_ not in added and is_text(piece) and not BYTE.fullmatch(self.words[id_] or "")
        ]  # fmt: skip
        sample = plain[:: 1 + len(plain) // SAMPLE]
        for ids in (sample, *self._ids(list(PROBES))):
            ids = [id_ for id_ in ids if id_ < len(self.pieces) and self.pieces[id_] and id_ not in added]
            theirs = str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            if self.join(ids).decode("utf-8", "replace").lstrip(" ") != theirs.lstrip(" "):
                return False
        return True

    def changes(self, texts: Sequence[str]) -> list[bool]:
        """Does the tokenizer by itself read something else in the place of a text (lower case, another Unicode form)?

        What it has no token for, and reads as nothing known, is not changed.
        """
        written = [self.join(ids).strip().removeprefix(self._lead.strip().encode()) for ids in self._ids(list(texts))]
        return [bool(found) and not found.endswith(text.encode()) for found, text in zip(written, texts, strict=True)]

    def alphabet(self) -> list[str]:
        """The characters that its ordinary tokens are made of, in order."""
        return sorted({char for piece in self.pieces if piece and is_text(piece) for char in piece.decode()})

    def __len__(self) -> int:
        return len(self.pieces)

    def join(self, ids: Sequence[int]) -> bytes:
        """What ids write; special tokens write nothing."""
        return b"".join([self.pieces[id_] or b"" for id_ in ids if id_ < len(self.pieces)])

    def encode(self, texts: Sequence[bytes]) -> list[list[Span]]:
        """Tokens of each text, none of them special; whatever the bytes are, the tokens write just these.

        They are those that the tokenizer itself gives, wherever it keeps a text's bytes. Around what it changes, and for what
        is no UTF-8, the longest tokens that fit are taken; bytes that no token writes are in no span.
        """
        whole: dict[int, str] = {}
        for i, text in enumerate(texts):
            try:
                whole[i] = text.decode()
            except UnicodeDecodeError:
                continue
        ids = dict(zip(whole, self._ids(list(whole.values())), strict=True))
        found = []
        for i, text in enumerate(texts):
            spans = self._behind_lead(ids[i], text) if i in ids else None
            found.append(list(self._piecewise(text)) if spans is None else spans)
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids = self.tokenizer(
            [self._lead + text for text in texts],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return [list(each) for each in ids["input_ids"]]

    def _behind_lead(self, ids: list[int], text: bytes) -> list[Span] | None:
        """The tokens of a text without those of the lead; None where they do not write its bytes."""
        end, spans = len(text), list[Span]()
        for id_ in reversed(ids):
            piece = self.pieces[id_]
            if end == 0 and self._lead:
                break
            if not piece or not text.endswith(piece, 0, end):
                return None
            spans.append(Span(id_, end - len(piece), end))
            end -= len(piece)
        return spans[::-1] if end == 0 else None

    def _piecewise(self, text: bytes) -> Iterator[Span]:
        at = 0
        while at < len(text):
            try:
                good = len(text) - at
                text[at:].decode()
                bad = 0
            except UnicodeDecodeError as error:
                good, bad = error.start, error.end - error.start
            yield from _moved(self._halved(text[at : at + good].decode()), at)
            at += good
            yield from _moved(self._greedy(text[at : at + bad]), at)
            at += bad

    def _halved(self, text: str) -> Iterator[Span]:
        """Tokens of a text, cut in halves until what the tokenizer changes stands alone."""
        if not text:
            return
        data = text.encode()
        spans = self._behind_lead(self._ids([text])[0], data)
        if spans is not None:
            yield from spans
        elif len(text) == 1:
            yield from self._greedy(data)
        else:
            middle = len(text) // 2
            yield from self._halved(text[:middle])
            by = len(text[:middle].encode())
            yield from _moved(self._halved(text[middle:]), by)

    def _greedy(self, data: bytes) -> Iterator[Span]:
        at = 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                id_ = self.id_of.get(data[at:end])
                if id_ is not None:
                    yield Span(id_, at, end)
                    at = end
                    break
            else:
                at += 1

    def _find_lead(self) -> str:
        known = [
            text for text in TRIED if all(bytes([b]) in self.id_of for b in text.encode()) or text.encode() in self.id_of
        ]
        best, most = "", -1
        for lead in LEADS:
            self._lead = lead
            kept = sum(
                self._behind_lead(ids, text.encode()) is not None for ids, text in zip(self._ids(known), known, strict=True)
            )
            if kept > most:
                best, most = lead, kept
        return best


def is_text(piece: bytes) -> bool:
    """Is it UTF-8, and not cut within a character?"""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _moved(spans: Iterable[Span], by: int) -> Iterator[Span]:
    return (Span(span.token, span.start + by, span.end + by) for span in spans)


def _scheme(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How a vocabulary's words become bytes: "bytes" (each character stands for one), "spaces" (▁ and <0x0A>), or "text"."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "spaces" if hasattr(tokenizer, "sp_model") else None
    parts = json.loads(backend.to_str())
    kinds = {kind for name in ("decoder", "pre_tokenizer", "normalizer") for kind in _kinds(parts[name])}
    decoders = set(_kinds(parts["decoder"]))
    affixes = [parts["model"].get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    if decoders & {"WordPiece", "CTC", "BPEDecoder"} or any(affixes):
        return None
    if "ByteLevel" in kinds:
        return "bytes"
    return "spaces" if {"Metaspace", "ByteFallback", "Replace"} & decoders else "text"


def _kinds(part: dict[str, Any] | None) -> Iterator[str]:
    if part is not None:
        yield part["type"]
        for inner in (*part.get("decoders", ()), *part.get("pretokenizers", ()), *part.get("normalizers", ())):
            yield from _kinds(inner)


def _piece(word: str, scheme: str) -> bytes | None:
    if scheme == "bytes":
        try:
            return bytes(BYTE_OF[character] for character in word)
        except KeyError:
            return None
    if scheme == "spaces":
        match = BYTE.fullmatch(word)
        return bytes([int(match[1], 16)]) if match else word.replace(SPACE, " ").encode()
    return word.encode()


def _byte_of() -> dict[str, int]:
    """The bytes behind byte-level BPE's characters: what prints stands for itself, the others are 256, 257, ... in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of()
