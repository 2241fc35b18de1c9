"""Whatever a server answers: what is right is taken, all else is one paragraph, and its words do no harm."""

from __future__ import annotations

import base64
import gzip
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from conftest import HANG, own_port
from fake_server import FakeServer, changed, reply, serving, status
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import npd
import npd.scoring.server
from npd.config import TeacherConfig, load_config
from npd.errors import NpdError, UserError
from npd.models import Vocabulary
from npd.scoring import TeacherSetting
from npd.scoring.served import ServedTeacher, _read
from npd.scoring.server import Server
from npd.scoring.transport import Answer, Transport, hide

VOCABULARY = Vocabulary(size=20, stop_ids=(2,), start_id=1)
IDS, START = [1, 4, 5, 2], 2


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(npd.scoring.server, "LONGEST_PAUSE", 0.05)


def answering(kind: Any, answer: Any) -> Server:
    """What talks with a server that answers this, an object or bytes, to everything."""
    config = TeacherConfig(model="big", server="http://nowhere", api=kind, retry_seconds=0)
    server = Server(config)
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    server.transport.request = lambda path, body, most: Answer(200, data, 0.0)  # type: ignore[method-assign]
    return server


def vllm(rows: list[list[tuple[int, float]]], own: list[float]) -> Any:
    """Entries for the tokens behind START; the token's own is always among them."""
    entries: list[Any] = [None] + [{"9": {"logprob": -0.5}}] * (START - 1)
    for token, value, row in zip(IDS[START:], own, rows, strict=True):
        entries.append({str(i): {"logprob": v, "rank": 1} for i, v in [*row, (token, value)]})
    return {"choices": [{"prompt_logprobs": entries}]}


def sglang(rows: list[list[tuple[int, float]]], own: list[float]) -> Any:
    given = [[None, IDS[START - 1], None], *([v, i, None] for i, v in zip(IDS[START:], own, strict=True))]
    return {
        "meta_info": {
            "input_token_logprobs": given,
            "input_top_logprobs": [None, *([[v, i, None] for i, v in r] for r in rows)],
        }
    }


KINDS = {"vllm": vllm, "sglang": sglang}


def distributions(draw: Any, size: int) -> np.ndarray:
    """[2, V] log-probabilities: flat, peaked, with ties, or certain of one token."""
    shape = draw(st.sampled_from(["flat", "peaked", "ties", "certain"]))
    if shape == "flat":
        logits = np.zeros((2, size))
    elif shape == "certain":
        logits = np.full((2, size), -9999.0)
        logits[:, draw(st.integers(0, size - 1))] = 0.0
    else:
        values = st.sampled_from([0.0, 1.0, 5.0]) if shape == "ties" else st.floats(-30, 30)
        logits = np.array(draw(st.lists(values, min_size=2 * size, max_size=2 * size))).reshape(2, size)
    return logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)


ROUNDED: dict[str, Callable[[float], Any]] = {
    "as it is": float,
    "four decimals": lambda x: round(x, 4),
    "two decimals": lambda x: round(x, 2),
    "float16": lambda x: float(np.float16(x)),
    "a little above": lambda x: x + 1e-6,
    "whole": lambda x: int(x) if x == int(x) else x,
}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from([*KINDS]), rounding=st.sampled_from([*ROUNDED]))
def test_what_is_right_is_taken(data, kind, rounding):
    size = data.draw(st.integers(6, 12))
    k = data.draw(st.integers(1, size))
    logprobs = distributions(data.draw, size)
    assume(rounding != "two decimals" or size < 8)
    said = [[ROUNDED[rounding](float(x)) for x in row] for row in logprobs]
    best = [sorted(range(size), key=row.__getitem__, reverse=True)[:k] for row in said]
    shown = [[(i, row[i]) for i in data.draw(st.permutations(mine))] for row, mine in zip(said, best, strict=True)]
    own = [row[token] for row, token in zip(said, IDS[START:], strict=True)]
    reading = _read(answering(kind, KINDS[kind](shown, own)), Vocabulary(size, (2,), 1), IDS, START, k)
    np.testing.assert_allclose(reading.logprobs, np.minimum(own, 0), rtol=1e-6)
    for t, row in enumerate(said):
        assert len(set(reading.topk_ids[t].tolist())) == k
        np.testing.assert_allclose(reading.topk_logprobs[t], sorted((min(x, 0) for x in row), reverse=True)[:k], rtol=1e-6)
    assert (reading.topk_logprobs <= 0).all()
    assert np.isfinite(reading.topk_logprobs).all()


GOOD = [[(4, -0.5), (7, -1.5), (9, -3.0)]] * 2, [-4.0, -5.0]
# What was trained on, or crashed, where nobody looked.
NONSENSE: dict[str, tuple[list[tuple[Any, Any]], Any]] = {
    "five": ([(4, 5.0), (7, -1.5), (9, -3.0)], -4.0),
    "certain of three": ([(4, 0.0), (7, 0.0), (9, 0.0)], -4.0),
    "more than all": ([(4, -0.1), (7, -0.1), (9, -3.0)], -4.0),
    "nothing": ([(4, -math.inf), (7, -math.inf), (9, -math.inf)], -math.inf),
    "nearly nothing": ([(4, -9999.0), (7, -9999.0), (9, -9999.0)], -9999.0),
    "true": ([(4, True), (7, -1.5), (9, -3.0)], -4.0),
    "own true": ([(4, -0.5), (7, -1.5), (9, -3.0)], True),
    "beyond float16": ([(4, -0.5), (7, -1.5), (9, -70000)], -4.0),
    "own beyond float16": ([(4, -0.5), (7, -1.5), (9, -3.0)], -70000),
    "no number": ([(4, -0.5), (7, math.nan), (9, -3.0)], -4.0),
    "own no number": ([(4, -0.5), (7, -1.5), (9, -3.0)], math.nan),
    "infinite": ([(4, math.inf), (7, -1.5), (9, -3.0)], -4.0),
    "a word": ([(4, "-0.5"), (7, -1.5), (9, -3.0)], -4.0),
    "null": ([(4, None), (7, -1.5), (9, -3.0)], -4.0),
    "a list": ([(4, [-0.5]), (7, -1.5), (9, -3.0)], -4.0),
    "huge": ([(4, -(10**400)), (7, -1.5), (9, -3.0)], -4.0),
    "one id again": ([(4, -0.5), (4, -1.5), (4, -3.0)], -4.0),
    "too few": ([(4, -0.5)], -4.0),
    "none": ([], -4.0),
    "half an id": ([(0.7, -0.5), (1.7, -1.5), (9, -3.0)], -4.0),
    "a negative id": ([(-4, -0.5), (7, -1.5), (9, -3.0)], -4.0),
    "an endless id": ([(1 << 40, -0.5), (7, -1.5), (9, -3.0)], -4.0),
    "a true id": ([(True, -0.5), (7, -1.5), (9, -3.0)], -4.0),
    "likelier than the likeliest": ([(4, -2.5), (7, -2.5), (9, -3.0)], -0.5),
}  # fmt: skip


def one_paragraph(error: NpdError) -> str:
    said = str(error)
    assert said.isprintable()
    assert len(said) < 1500
    return said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(kind, name):
    row, own = NONSENSE[name]
    if kind == "vllm" and name == "likelier than the likeliest":
        pytest.skip("the token's own is one of those that are ranked")
    answer = KINDS[kind]([GOOD[0][0], row], [GOOD[1][0], own])
    with pytest.raises(UserError, match=r"http://nowhere (answers|gave)") as caught:
        answering(kind, answer).read(IDS, START, 3)
    one_paragraph(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_answer_that_nonsense_is_made_of_is_taken(kind):
    assert len(answering(kind, KINDS[kind](*GOOD)).read(IDS, START, 3)) == 2


ODD_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=6)
    | st.sampled_from(["7", "07", "-7", "٧", "logprob", "\x1b[2J", "\ud800", 10**400, 0.7]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["7", "logprob", "id", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = put(copy[path[0]], path[1:], value)
    return copy


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from([*KINDS]), value=ODD_JSON)
def test_anything_anywhere_in_an_answer_is_right_or_one_paragraph(data, kind, value):
    tree = KINDS[kind](*GOOD)
    answer = put(tree, data.draw(st.sampled_from(places(tree))), value)
    try:
        reading = _read(answering(kind, answer), VOCABULARY, IDS, START, 3)
    except NpdError as error:
        one_paragraph(error)
        return
    assert reading.logprobs.shape == (2,)
    assert reading.topk_ids.shape == (2, 3)
    assert (reading.topk_logprobs <= 0).all()
    assert (reading.topk_logprobs > -66000).all()
    assert ((reading.topk_ids >= 0) & (reading.topk_ids < 20)).all()
    assert all(len(set(row)) == 3 for row in reading.topk_ids.tolist())
    assert (np.exp(reading.topk_logprobs).sum(1) < 1.03).all()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from([*KINDS]), value=ODD_JSON)
def test_anything_in_what_is_written_or_told_is_right_or_one_paragraph(data, kind, value):
    written = (
        {"choices": [{"token_ids": [5, 6]}]}
        if kind == "vllm"
        else {"output_ids": [5], "meta_info": {"finish_reason": {"matched": 2}}}
    )
    server = answering(kind, put(written, data.draw(st.sampled_from(places(written))), value))
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 1, "stop_ids": [2]}
    try:
        ids = server.write(IDS, **options)
        assert 0 < len(ids) <= 4
        assert all(type(i) is int and i >= 0 for i in ids)
    except NpdError as error:
        one_paragraph(error)
    told = answering(
        kind, put({"tokens": [4, 5]}, data.draw(st.sampled_from([(), ("tokens",), ("tokens", 1)])), value)
    ).tokenize("x")
    assert told is None or all(type(i) is int and 0 <= i < 1 << 31 for i in told)
    cards = {"data": [{"id": "big", "owned_by": "vllm", "max_model_len": 9}]}
    try:
        answering(kind, put(cards, data.draw(st.sampled_from(places(cards))), value)).models()
    except NpdError as error:
        one_paragraph(error)


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"\xff\xfe", b"", b"\x1b[31mred", b'"\\ud800"', b"null", b"NaN",
     b"[[[[]]]]"],
    ids=["deep list", "deep object", "long number", "no text", "nothing", "escape", "surrogate", "null", "nan", "lists"],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_one_paragraph(kind, data):
    server = answering(kind, data)
    for ask in (lambda: server.read(IDS, START, 3), server.models):
        with pytest.raises(NpdError) as caught:
            ask()
        one_paragraph(caught.value)


def test_a_top_k_without_shared_ids_ends(monkeypatch):
    """Wider and wider, each time with ids of the teacher alone."""
    asked: list[int] = []
    server = answering("sglang", b"")

    def request(path: str, body: Any, most: int) -> Answer:
        k = body["top_logprobs_num"]
        asked.append(k)
        rows = [[(100 + i, -math.log(k)) for i in range(k)]] * 2
        return Answer(200, json.dumps(sglang(rows, [-50.0, -50.0])).encode(), 0.0)

    monkeypatch.setattr(server.transport, "request", request)
    with pytest.raises(UserError, match="only 0 are the student's too"):
        _read(server, VOCABULARY, IDS, START, 3)
    assert len(asked) < 20


# -- through the wire


@pytest.fixture(scope="module")
def server(teacher_dir):
    with serving(teacher_dir) as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults_left(request):
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").faults = []


def served(server: FakeServer, **options: Any) -> ServedTeacher:
    config = TeacherConfig(
        model="big", server=server.url, **{"concurrency": 2, "timeout": HANG, "retry_seconds": 0, **options}
    )
    return ServedTeacher(config, TeacherSetting(VOCABULARY, 0, "cpu", 64))


def drip(handler: Any, head: bytes, piece: bytes) -> None:
    """A beginning, then a piece now and then, until the other side has enough."""
    handler.close_connection = True
    try:
        handler.wfile.write(head)
        for _ in range(20 * int(HANG)):
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nX-Header: ", b"x"),
        (b"HTTP/1.1 ", b"2"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\n", b" "),
    ],
    ids=["body", "body without a length", "chunks", "header", "status", "continue", "error"],
)
def test_a_server_that_drips_is_late(server, head, piece):
    server.faults = [lambda handler, answer: drip(handler, head, piece)]
    began = time.monotonic()
    with pytest.raises(NpdError, match=r"did not answer /v1/completions within teacher.timeout 0.5 s") as caught:
        served(server, timeout=0.5)([[4]], [[5, 2]], 2)
    assert time.monotonic() - began < HANG / 2
    one_paragraph(caught.value)


def test_a_dripping_server_is_survived_by_asking_again(server):
    server.faults = [lambda handler, answer: drip(handler, b"HTTP/1.1 200 OK\r\n\r\n", b" ")]
    assert len(served(server, timeout=0.5, retry_seconds=HANG)([[4]], [[5, 2]], 2)) == 1


def test_a_body_has_a_bound(server, monkeypatch):
    monkeypatch.setattr(npd.scoring.server, "LEAST_BODY", 1 << 16)

    def endless(handler: Any, answer: Any) -> None:
        handler.close_connection = True
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            for _ in range(10_000):
                handler.wfile.write(b"\x1b[1m" * 4096)
        except OSError:
            pass

    server.faults = [endless]
    with pytest.raises(UserError, match="more than an answer to what it was asked can have") as caught:
        served(server)([[4]], [[5, 2]], 2)
    one_paragraph(caught.value)


def test_what_is_compressed_unasked_is_refused_unread(server):
    bomb = gzip.compress(b" " * (1 << 24))
    server.faults = [lambda handler, answer: reply(handler, bomb, Content_Encoding="gzip")]
    with pytest.raises(UserError, match="not asked to compress"):
        served(server)([[4]], [[5, 2]], 2)


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_redirections_are_not_followed(server, code, monkeypatch):
    monkeypatch.setenv("NPD_TEACHER_API_KEY", "s3cret-s3cret")
    seen: list[str] = []
    with own_port() as port:
        server.faults = [status(code, "elsewhere", Location=f"http://127.0.0.1:{port}/v1/completions")]
        with pytest.raises(UserError, match="elsewhere"):
            served(server)([[4]], [[5, 2]], 2)
    assert not seen


ODD_HEADS = (
    *(
        "Content-Length: -5",
        "Content-Length: 5, 7",
        "Content-Length: x",
        "Transfer-Encoding: chunked",
        "Content-Encoding: br",
    ),
    *("Retry-After: " + "9" * 6000, "Retry-After: Mon, 99 Foo 99999 99:99:99 GMT", "X\x1b[31m: \x00", ": :"),
)


@pytest.mark.parametrize("headers", ODD_HEADS)
@pytest.mark.parametrize("code", ["200", "429", "999", "000", "2", "x"])
def test_odd_heads_are_one_paragraph(server, capfd, headers, code):
    def odd(handler: Any, answer: Any) -> None:
        handler.close_connection = True
        handler.wfile.write(f"HTTP/1.1 {code} OK\r\n{headers}\r\n\r\n".encode() + b"zz\r\nnothing")

    server.faults = [odd]
    with pytest.raises(NpdError) as caught:
        served(server)([[4]], [[5, 2]], 2)
    one_paragraph(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_speaks_no_tls_is_not_trusted(server):
    with pytest.raises(UserError, match="can't be trusted"):
        Server(TeacherConfig(model="big", server=server.url.replace("http", "https"))).models(patience=0)


# -- secrets


KEY = "sk-Se/cret+Key=42&x"


def shapes(key: str) -> dict[str, str]:
    return {
        "plain": f"Bearer {key}",
        "quoted": quote(key, safe=""),
        "quoted in small letters": quote(key, safe="").lower(),
        "other case": key.upper(),
        "in base64": base64.b64encode(key.encode()).decode(),
        "header in base64": base64.b64encode(f"Authorization: Bearer {key}".encode()).decode(),
        "one before": base64.urlsafe_b64encode(f"u:{key}".encode()).decode(),
        "json": json.dumps({"authorization": f"Bearer {key}"}),
        "coloured": f"\x1b[31m{key}\x1b[0m",
        "broken by nothing": key[:4] + "\x00" + key[4:],
        "at the end": "x" * 280 + key,
        "far off": "x" * 3000 + key,
    }


def reveals(text: str, key: str) -> bool:
    """Is more than a few characters of a key in a text, in any of its shapes?"""
    low = text.lower()
    forms = [key, quote(key, safe=""), *(base64.b64encode(b"0" * n + key.encode()).decode()[4:-4] for n in range(3))]
    return any(form[i : i + 9].lower() in low for form in forms for i in range(len(form) - 8))


@pytest.mark.parametrize("shape", shapes(KEY))
@pytest.mark.parametrize("where", ["400", "500", "no JSON", "strange", "status line", "model"])
def test_a_key_is_never_repeated(server, monkeypatch, shape, where):
    monkeypatch.setenv("NPD_TEACHER_API_KEY", KEY)
    said = shapes(KEY)[shape]
    faults: dict[str, Callable[[Any, Any], None]] = {
        "400": status(400, f"wrong header: {said}"),
        "500": status(500, said),
        "no JSON": lambda handler, answer: reply(handler, said.encode()),
        "strange": changed(lambda answer: (answer.clear(), answer.update({"headers": {"Authorization": said}}))),
        "status line": lambda handler, answer: handler.wfile.write(f"{said}\r\n\r\n".encode()),
        "model": changed(lambda answer: answer["choices"][0]["prompt_logprobs"][1].update({said: {"logprob": said}})),
    }  # fmt: skip

    def fault(handler: Any, answer: Any) -> None:
        handler.close_connection = True
        faults[where](handler, answer)

    heard: list[str] = []
    server.faults = [fault]
    teacher = served(server)
    teacher.server.say = heard.append
    with pytest.raises(NpdError) as caught:
        teacher([[4]], [[5, 2]], 2)
    for text in (one_paragraph(caught.value), *heard, repr(caught.value)):
        assert not reveals(text, KEY), text


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40),
    st.text(max_size=5),
    st.text(max_size=5),
)
def test_a_key_is_hidden_whatever_it_is(key, before, after):
    for said in (key, quote(key, safe=""), base64.b64encode(f"{before}{key}{after}".encode()).decode()):
        hidden = hide(f"{before} {said} {after}", key)
        assert key not in hidden
        assert said not in hidden


def test_what_is_too_short_to_be_a_key_spoils_no_words():
    assert hide("an empty body", "a") == "an empty body"


def test_a_run_keeps_no_words_of_a_server_raw(make_tree, teacher_dir, monkeypatch):
    monkeypatch.setenv("NPD_TEACHER_API_KEY", KEY)
    with serving(teacher_dir, key=KEY) as server:
        tree = make_tree(teacher={"model": "big", "server": server.url, "retry_seconds": 5})
        npd.refresh(tree)
        for part in Path(tree["run_dir"]).rglob("part-*.parquet"):
            part.unlink()
        for manifest in Path(tree["run_dir"]).rglob("manifest.json"):
            manifest.unlink()
        server.faults = [reply, status(503, f"\x1b[2JBearer {KEY}"), reply, status(400, f"\x1b]0;x\x07Bearer {KEY}")]
        with pytest.raises(UserError, match="refuses") as caught:
            npd.distill(tree)
    one_paragraph(caught.value)
    for file in Path(tree["run_dir"]).rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert KEY.encode() not in content
            assert KEY.encode()[:9] not in content
            if file.suffix in (".jsonl", ".html", ".log"):
                assert b"\x1b" not in content
                assert b"\\u001b" not in content


@pytest.mark.parametrize(
    "options",
    [
        {"server": "http://user:hunter22@host:8000"},
        {"server": "https://hunter22@host"},
        {"server": "http://host:8000?api_key=hunter22"},
        {"server": "http://host/#hunter22"},
        {"api_key_env": "hunter22-key", "server": "http://host"},
        {"options": {"deep": [{"url": "redis://:hunter22@host"}]}},
        {"options": {"api_key": "hunter22"}},
    ],
)
def test_secrets_are_no_options(make_tree, options):
    with pytest.raises(UserError, match=r"teacher") as caught:
        load_config(make_tree(teacher={"model": "big", **options}))
    assert "hunter22" not in str(caught.value)
    with pytest.raises(ValueError, match=r"options|server|api_key_env|URL"):
        TeacherConfig(model="big", **options)


@pytest.mark.parametrize("where", ["data", "plugins", "student"])
def test_no_url_of_any_option_has_a_password(make_tree, where):
    url = "https://me:hunter22@host/train.jsonl"
    tree = make_tree()
    tree |= {"data": {**tree["data"], "train": url}} if where == "data" else {}
    tree |= {"plugins": [url]} if where == "plugins" else {}
    tree |= {"student": {"model": url}} if where == "student" else {}
    with pytest.raises(UserError, match="in a URL") as caught:
        load_config(tree)
    assert "hunter22" not in str(caught.value)


def test_what_is_no_secret_is_an_option():
    TeacherConfig(model="me@host", server="http://host:8000/a@b", options={"hf_token": True, "api_key": ""})


def test_no_connection_outlives_its_deadline_in_another_thread(server):
    """A deadline that has passed cuts its own request alone."""
    transport = Transport(TeacherConfig(model="big", server=server.url, timeout=HANG), server.url)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(transport.request("/v1/models", None, 1 << 20).status))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 4
