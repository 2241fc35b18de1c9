"""A server that reads with a real model as vLLM's or SGLang's does, and fails as asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from conftest import HANG, own_port
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = dict[str, Any]


class FakeServer:
    """Serves `path`'s model under `name`; each entry of `faults` spoils one POST that reads or writes, in their order.

    A fault is a function that gets the handler and the right answer, and answers instead.
    """

    def __init__(
        self,
        path: str,
        *,
        kind: str = "vllm",
        name: str = "big",
        cap: int = 20,
        context: int = 4096,
        key: str | None = None,
        tokenizes: bool = True,
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.kind, self.name, self.cap, self.context, self.key, self.tokenizes = kind, name, cap, context, key, tokenizes
        self.faults: list[Callable[[Any, Answer], None]] = []
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self._place = ExitStack()
        self.port = self._place.enter_context(own_port())
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                server.get(self)

            def do_POST(self) -> None:
                server.post(self)

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64
            allow_reuse_port = True

            def handle_error(self, *_: Any) -> None:  # clients that went away
                pass

        self._http = Http(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._place.close()

    # -- answers

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/models" and self._allowed(handler):
            card = {"id": self.name, "owned_by": self.kind, "max_model_len": self.context}
            reply(handler, {"object": "list", "data": [card]})

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if not self._allowed(handler):
            return
        if handler.path == "/tokenize":
            if self.tokenizes and "messages" in body:
                if self.tokenizer.chat_template:
                    text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
                    reply(handler, {"tokens": self.tokenizer(text, add_special_tokens=False)["input_ids"]})
                else:
                    reply(handler, {"error": {"message": "no chat template"}}, 400)
            elif self.tokenizes:
                options = {"add_special_tokens": False} if body.get("add_special_tokens") is False else {}
                reply(handler, {"tokens": self.tokenizer(body["prompt"], **options)["input_ids"]})
            else:
                reply(handler, {"detail": "Not Found"}, 404)
            return
        with self.lock:
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            fault = self.faults.pop(0) if self.faults else None
        try:
            time.sleep(self.delay)
            answer, status = self.answer(handler.path, body)
            if fault:
                fault(handler, answer)
            else:
                reply(handler, answer, status)
        finally:
            with self.lock:
                self.at_once -= 1

    def _allowed(self, handler: BaseHTTPRequestHandler) -> bool:
        if self.key is None or handler.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        reply(handler, {"error": {"message": "Unauthorized"}}, 401)
        return False

    def answer(self, path: str, body: dict[str, Any]) -> tuple[Answer, int]:
        if self.kind == "sglang":
            assert path == "/generate"
            if not body.get("return_logprob"):
                return self._written(body["input_ids"], body["sampling_params"]), 200
            return self._sglang(body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]), 200
        assert path == "/v1/completions"
        if body["model"] != self.name:
            return {"error": {"message": f"The model `{body['model']}` does not exist."}}, 404
        if "prompt_logprobs" not in body:
            return self._written(body["prompt"], body), 200
        k = body["prompt_logprobs"]
        if k > self.cap:
            return {
                "error": {"message": f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.cap}"}
            }, 400
        return self._vllm(body["prompt"], k), 200

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[T, V] of the token at each position; the first row is of nothing."""
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1).roll(1, 0)

    def _vllm(self, ids: list[int], k: int) -> Answer:
        entries: list[dict[str, Any] | None] = [None]
        for token, row in zip(ids[1:], self.logprobs(ids)[1:], strict=True):
            best = row.topk(k)
            entry = {
                int(i): {"logprob": float(v), "rank": r + 1} for r, (i, v) in enumerate(zip(*reversed(best), strict=True))
            }
            entry.setdefault(token, {"logprob": float(row[token]), "rank": int((row > row[token]).sum()) + 1})
            # The token itself comes first, as it does there.
            entries.append({str(t): entry[t] for t in sorted(entry, key=lambda t: t != token)})
        return {"choices": [{"text": "", "prompt_logprobs": entries}]}

    def _sglang(self, ids: list[int], start: int, k: int) -> Answer:
        rows = self.logprobs(ids)
        own: list[Any] = [[None, ids[start], None]]
        tops: list[Any] = [None]
        for token, row in zip(ids[start + 1 :], rows[start + 1 :], strict=True):
            own.append([float(row[token]), token, None])
            tops.append([[float(v), int(i), None] for v, i in zip(*row.topk(k), strict=True)])
        return {"text": "", "meta_info": {"input_token_logprobs": own, **({"input_top_logprobs": tops} if k else {})}}

    def _written(self, ids: list[int], options: dict[str, Any]) -> Answer:
        """Greedy, whatever the temperature."""
        written: list[int] = []
        limit: int = options.get("max_tokens") or options["max_new_tokens"]
        while len(written) < limit and written[-1:] != [2]:
            with torch.no_grad():
                written.append(int(self.model(torch.tensor([ids + written])).logits[0, -1, :20].argmax()))
        if self.kind == "sglang":  # which leaves the stop token out
            assert not options.get("ignore_eos"), "which would ignore stop_token_ids too"
            stopped = written[-1] in options["stop_token_ids"]
            reason = {"type": "stop", "matched": written[-1]} if stopped else {"type": "length", "length": limit}
            return {"output_ids": written[:-1] if stopped else written, "meta_info": {"finish_reason": reason}}
        return {"choices": [{"text": "", "token_ids": written, "prompt_token_ids": ids, "finish_reason": "stop"}]}


def reply(handler: Any, body: Any, status: int = 200, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


# -- faults


def status(code: int, message: str = "overloaded", **headers: str) -> Callable[[Any, Answer], None]:
    return lambda handler, answer: reply(handler, {"error": {"message": message}}, code, **headers)


def dropped(handler: Any, answer: Answer) -> None:
    """The connection closes without a word."""
    handler.close_connection = True
    handler.connection.close()


def cut_short(handler: Any, answer: Answer) -> None:
    """Half of a body, then the connection closes."""
    data = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def malformed(handler: Any, answer: Answer) -> None:
    reply(handler, b"<html>502 Bad Gateway</html>")


class Hanging:
    """Answers only once it is let go. `asked` is set when it is asked first."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()

    def __call__(self, handler: Any, answer: Answer) -> None:
        self.asked.set()
        self.go.wait(HANG)
        reply(handler, answer)


def changed(change: Callable[[Answer], Any]) -> Callable[[Any, Answer], None]:
    """The right answer, altered."""

    def fault(handler: Any, answer: Answer) -> None:
        change(answer)
        reply(handler, answer)

    return fault


@contextmanager
def serving(path: Any, **options: Any) -> Iterator[FakeServer]:
    server = FakeServer(str(path), **options)
    try:
        yield server
    finally:
        server.close()
