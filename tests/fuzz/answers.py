"""Served teachers that answer nonsense, never end, or mean harm; the server is a fork of this process too."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

from fake_server import FakeServer, cut_short, dropped, malformed, reply

from .hostile import DICTIONARY, LONG, deep
from .world import KEY, Case, World

COUNT = 300
TIMEOUT, RETRY = 2.0, 1.5
Fault = Callable[[Any, Any], None]
Change = Callable[[Any, random.Random], Any]


# -- wrong in what they say


def numbers(answer: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every log-probability of an answer, in either server's words."""
    places: list[tuple[Any, Any]] = []
    if "choices" in answer:
        for entry in answer["choices"][0].get("prompt_logprobs") or []:
            places += [(value, "logprob") for value in (entry or {}).values()]
    else:
        facts = answer["meta_info"]
        places += [(own, 0) for own in facts.get("input_token_logprobs", []) if own[0] is not None]
        places += [(best, 0) for bests in facts.get("input_top_logprobs", []) for best in bests or []]
    return places


def set_all(value: Any) -> Change:
    def change(answer: Any, rng: random.Random) -> Any:
        for container, key in numbers(answer):
            container[key] = value
        return answer

    return change


def set_one(value: Any) -> Change:
    def change(answer: Any, rng: random.Random) -> Any:
        container, key = rng.choice(numbers(answer))
        container[key] = value
        return answer

    return change


def shifted(answer: Any, rng: random.Random) -> Any:
    for container, key in numbers(answer):
        container[key] += 3.0
    return answer


def same_ids(answer: Any, rng: random.Random) -> Any:
    """One id everywhere."""
    if "choices" in answer:
        for entry in answer["choices"][0].get("prompt_logprobs") or []:
            if entry:
                values = list(entry.values())
                entry.clear()
                entry.update({f"{i * '0'}5": value for i, value in enumerate(values)})
    else:
        for bests in answer["meta_info"].get("input_top_logprobs", []):
            for best in bests or []:
                best[1] = 5
    return answer


def ids(make: Callable[[int], Any]) -> Change:
    def change(answer: Any, rng: random.Random) -> Any:
        if "choices" in answer:
            for entry in answer["choices"][0].get("prompt_logprobs") or []:
                if entry:
                    values = list(entry.items())
                    entry.clear()
                    entry.update({str(make(int(name))): value for name, value in values})
        else:
            for bests in answer["meta_info"].get("input_top_logprobs", []):
                for best in bests or []:
                    best[1] = make(best[1])
        return answer

    return change


def shortened(answer: Any, rng: random.Random) -> Any:
    """One position, or the end of the top-k, is missing."""
    lists = [answer["choices"][0]["prompt_logprobs"]] if "choices" in answer else list(answer["meta_info"].values())
    for one in lists:
        if rng.random() < 0.5:
            del one[rng.randrange(len(one))]
        else:
            one[-1] = one[-1][:1] if isinstance(one[-1], list) else dict(list((one[-1] or {}).items())[:1])
    return answer


def anywhere_in(answer: Any, rng: random.Random) -> Any:
    """A value anywhere replaced by one that nobody should send."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(answer)
    for _ in range(rng.choice((1, 1, 5))):
        container, key = rng.choice(places)
        container[key] = rng.choice([value for value in DICTIONARY if not isinstance(value, bytes)])
    return answer


def whole_is(value: Any) -> Change:
    return lambda answer, rng: value


CHANGES: dict[str, Change] = {
    "+5 everywhere": set_all(5.0),
    "+5 once": set_one(5.0),
    "p = 1 everywhere": set_all(0.0),
    "p = 1 once": set_one(0.0),
    "-inf everywhere": set_all(-math.inf),
    "-inf once": set_one(-math.inf),
    "NaN everywhere": set_all(math.nan),
    "NaN once": set_one(math.nan),
    "true everywhere": set_all(True),
    "false everywhere": set_all(False),
    "-70000 everywhere": set_all(-70000),
    "text": set_all("-1.5"),
    "null": set_one(None),
    "1e308": set_one(-1e308),
    "a long integer": set_one(-(10**400)),
    "uniform": set_all(-math.log(20)),
    "shifted by 3": shifted,
    "one id": same_ids,
    "ids and a half": ids(lambda i: i + 0.5),
    "ids negative": ids(lambda i: -i - 1),
    "ids too large": ids(lambda i: i + 1_000_000),
    "ids as words": ids(lambda i: f"token {i}"),
    "ids with spaces": ids(lambda i: f" {i} "),
    "ids as other digits": ids(lambda i: "".join(chr(0x660 + int(c)) for c in str(i))),
    "a part missing": shortened,
    "anything anywhere": anywhere_in,
    "an empty object": whole_is({}),
    "a list": whole_is([]),
    "null for all": whole_is(None),
    "a number": whole_is(5),
    "no choices": whole_is({"choices": []}),
    "choices of nothing": whole_is({"choices": [None], "meta_info": None}),
    "an error of status 200": whole_is({"error": {"message": "no"}}),
}
MUST_END = ("uniform", "p = 1 everywhere", "false everywhere", "-70000 everywhere")  # they say the same of everything


# -- wrong in how they say it


def said(status: int, words: Callable[[Any], str]) -> Fault:
    return lambda handler, answer: reply(handler, {"error": {"message": words(handler)}}, status)


def body(data: bytes, status: int = 200, **headers: str) -> Fault:
    return lambda handler, answer: reply(handler, data, status, **headers)


def drips(handler: Any, answer: Any) -> None:
    """A byte now and then, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.2)


def drips_headers(handler: Any, answer: Any) -> None:
    for _ in range(600):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n"[:1] if _ == 0 else b"X")
        handler.wfile.flush()
        time.sleep(0.2)


def floods(handler: Any, answer: Any) -> None:
    """A body of gigabytes."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(4 << 30))
    handler.end_headers()
    for _ in range(4096):
        handler.wfile.write(b" " * (1 << 20))


def chunks(handler: Any, answer: Any) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(2048):
        handler.wfile.write(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")


def many_headers(handler: Any, answer: Any) -> None:
    handler.send_response(200)
    for number in range(5000):
        handler.send_header(f"X-{number}", LONG[:1000])
    handler.end_headers()
    handler.close_connection = True


def silent(handler: Any, answer: Any) -> None:
    time.sleep(3600)


def authorization(handler: Any) -> str:
    return f"bad request: Authorization: {handler.headers.get('Authorization')}"


BOMB = gzip.compress(b" " * 1_000_000_000, 9)
FAULTS: dict[str, Fault] = {
    **{
        f"status {code}, the key in its words": said(code, authorization) for code in (400, 401, 403, 404, 422, 429, 500, 503)
    },
    "the key alone": lambda handler, answer: reply(handler, KEY.encode(), 400),
    "the key in a header and a reason": lambda handler, answer: reply(
        handler, b"", 302, Location=f"http://127.0.0.1:9/{KEY}"
    ),
    "the key, escaped": said(400, lambda handler: KEY.replace("-", "\\u002d")),
    "escape sequences": said(400, lambda handler: "\x1b[31mred\x1b]0;title\x07\x9b31m\r\u202e"),
    "a long message": said(400, lambda handler: LONG),
    "a retry in a year": lambda handler, answer: reply(handler, {}, 503, Retry_After="31536000"),
    "a retry of nonsense": lambda handler, answer: reply(handler, {}, 429, Retry_After="-1e999 soon"),
    "status 204": body(b"", 204),
    "status 999": body(b"{}", 999),
    "redirect to itself": lambda handler, answer: reply(handler, b"", 307, Location=handler.path),
    "redirect to a file": lambda handler, answer: reply(handler, b"", 308, Location="file:///etc/passwd"),
    "cut short": cut_short,
    "dropped": dropped,
    "HTML": malformed,
    "drips": drips,
    "drips a header": drips_headers,
    "floods": floods,
    "chunks without end": chunks,
    "many headers": many_headers,
    "silent": silent,
    "a gzip bomb": body(BOMB, Content_Encoding="gzip"),
    "no gzip": body(b"not gzip", Content_Encoding="gzip"),
    "of an unknown coding": body(b"{}", Content_Encoding="x\x1b[31m"),
    "deep": body(deep(100_000).encode()),
    "deep objects": body(b'{"choices": ' * 5000),
    "a long number": body(b'{"choices": ' + b"9" * 6000 + b"}"),
    "no UTF-8": body(b'{"choices": "\xff\xfe"}'),
    "half a surrogate": body(b'{"error": {"message": "\\ud800"}}', 400),
    "NUL": body(b"\0" * 1000),
    "empty": body(b""),
    "UTF-16": body('{"choices": []}'.encode("utf-16")),
    "a status line of nonsense": lambda handler, answer: handler.wfile.write(b"\x1b[31mNONSENSE\r\n\r\n"),
}
WAYS = [*CHANGES, *FAULTS]


class Hostile(FakeServer):
    """Spoils answers from the `after`th on; with `places` also what is asked before."""

    def arm(self, fault: Fault, after: int, once: bool, early: str) -> None:
        self.fault, self.after, self.once, self.early, self.asked = fault, after, once, early, 0
        self.faults = _Every(self)

    def get(self, handler: Any) -> None:
        if self.early == "models":
            self.fault(handler, {"object": "list", "data": [{"id": self.name, "owned_by": self.kind, "max_model_len": 4096}]})
        else:
            super().get(handler)

    def post(self, handler: Any) -> None:
        if handler.path == "/tokenize" and self.early == "tokenize":
            handler.rfile.read(int(handler.headers["Content-Length"]))
            self.fault(handler, {"tokens": [1, 2, 3]})
        else:
            super().post(handler)


class _Every:
    """Stands in for FakeServer.faults: the fault of each request in its turn."""

    def __init__(self, server: Hostile) -> None:
        self.server = server

    def __bool__(self) -> bool:
        return True

    def pop(self, _: int) -> Fault | None:
        server = self.server
        server.asked += 1
        late = server.asked - server.after
        return server.fault if not server.early and (late == 1 or (late > 1 and not server.once)) else None


def serve(world: World, kind: str, fault: Fault, after: int, once: bool, early: str) -> tuple[int, str]:
    """Fork a server; its process and URL."""
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.setsid()
            server = Hostile(str(world.teacher), kind=kind, key=KEY)
            server.arm(fault, after, once, early)
            os.write(there, server.url.encode())
            os.close(there)
            while True:
                time.sleep(3600)
        os._exit(1)
    os.close(there)
    url = os.read(here, 100).decode()
    os.close(here)
    return pid, url


def changed(change: Change, rng: random.Random) -> Fault:
    """The right answer, altered."""

    def fault(handler: Any, answer: Any) -> None:
        with suppress(LookupError, TypeError, AttributeError):
            answer = change(deepcopy(answer), rng)
        try:
            text = json.dumps(answer)
        except ValueError:  # an integer longer than Python writes
            text = '{"choices": ' + "9" * 6000 + "}"
        reply(handler, text.encode("utf-8", "surrogatepass"))

    return fault


def attack(case: Case, world: World) -> None:
    scene = world.scene(case)
    rng = scene.rng
    way = WAYS[case.number % len(WAYS)]
    kind = ("vllm", "sglang")[case.number // len(WAYS) % 2]
    early = rng.choice(("", "", "", "", "", "models", "tokenize"))
    after, once = rng.choice((0, 0, 0, 2, 5)), rng.random() < 0.25
    fault = FAULTS[way] if way in FAULTS else changed(CHANGES[way], rng)
    lead = rng.choice((0.0, 0.0, 1.0))
    case.told = f"{kind}: {way}, after {after}{', once' if once else ''}{f', of {early}' if early else ''}, lead {lead:g}"
    pid, url = serve(world, kind, fault, after, once, early)
    options: dict[str, Any] = {"model": "big", "server": url, "timeout": TIMEOUT, "retry_seconds": RETRY, "concurrency": 2}
    if early != "tokenize" and rng.random() < 0.7:
        options["tokenizer"] = str(world.teacher)
    tree = world.tree(scene.run, {"schedule": {"lead": lead}, "training": {"max_steps": 4}})
    tree["teacher"] = options
    try:
        config = scene.write_config(tree)
        scene.npd("distill", str(config), limit=60)
        if case.status == 0 and way in MUST_END and not (after or once or early):
            case.fault("a teacher that says the same of everything was trained on")
    finally:
        os.kill(pid, signal.SIGKILL)
    scene.finish()
    scene.check_finished()
