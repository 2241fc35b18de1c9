"""A model behind HTTP: vLLM's or SGLang's server, asked in token ids.

What can be asked again is asked again, for as long as the configuration says: a connection that is refused or breaks, a
time-out, an answer that is no JSON, and the statuses 408, 429 and 5xx. Every other 4xx ends the work at once. The loop is our
own, not urllib3's Retry: that one counts tries where seconds are promised, sleeps where nobody can stop it, tells nobody that
the server is away, and never sees an answer's JSON.
"""

from __future__ import annotations

import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, NewConnectionError, SSLError, TimeoutError

from npd.config import TeacherConfig
from npd.errors import NpdError, RunError, UserError

LONGEST_PAUSE = 30.0  # seconds between tries
SHOWN = 300  # characters of a server's words
AGAIN = (408, 429)  # besides all of 5xx but 501

T = TypeVar("T")


class TokenLogprobs(NamedTuple):
    """What a model says about one token of a text."""

    logprob: float
    """Natural log of the token's own probability."""
    top: list[tuple[int, float]]
    """(id, log-probability), best first."""


class _TryAgain(Exception):
    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Server:
    """One model on one server. Safe to use from several threads.

    Args:
        say: is told when the server is away, and when it is back.
    """

    def __init__(self, config: TeacherConfig, say: Callable[[str], None] = lambda text: None) -> None:
        assert config.server is not None
        self.config, self.say = config, say
        self.url = config.server.rstrip("/").removesuffix("/v1")
        self._stop = threading.Event()  # set to end all that is waited for now
        self._away_since: float | None = None
        self._lock = threading.Lock()
        self._kind: str | None = None if config.api == "auto" else config.api
        timeout = urllib3.Timeout(connect=min(10.0, config.timeout), read=config.timeout)
        self._pool = urllib3.PoolManager(maxsize=config.concurrency, timeout=timeout, retries=False)

    # -- asking

    def ask(self, path: str, body: dict[str, Any] | None = None, *, patience: float | None = None) -> Any:
        """The JSON that the server answers to a GET, or to a POST of `body`.

        Args:
            patience: seconds to try again for; None: as configured.

        Raises:
            UserError: the server refuses what was asked; its words are in the message.
            RunError: it does not answer for too long.
        """
        patience = self.config.retry_seconds if patience is None else patience
        began, tries, stop = time.monotonic(), 0, self._stop
        while True:
            try:
                answer = self._once(path, body)
            except _TryAgain as error:
                tries += 1
                pause = max(error.after, random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, 2.0 ** (tries - 1)))
                if stop.is_set() or time.monotonic() + pause - began > patience:
                    asked = f" (asked {tries} times in {time.monotonic() - began:.0f} s)" if tries > 1 else ""
                    raise RunError(
                        f"The server {self.url} can't be used: {error}{asked}.",
                        "Nothing that was finished is lost: see to the server and run the same command again.",
                    ) from None
                self._is_away(str(error), patience)
                stop.wait(pause)
            else:
                self._is_back()
                return answer

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        key = os.environ.get(self.config.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"The environment variable {self.config.api_key_env} holds characters that no API key has.")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            if body is None:
                response = self._pool.request("GET", self.url + path, headers=headers, redirect=False)
            else:
                response = self._pool.request("POST", self.url + path, json=body, headers=headers, redirect=False)
            data = response.data
        except LocationParseError as error:
            raise UserError(f"teacher.server {self.config.server!r} is no URL: {error}.") from None
        except SSLError as error:
            raise UserError(f"The server {self.url} can't be trusted: {error}.") from None
        except NewConnectionError as error:
            raise _TryAgain(f"nothing answers there ({_last_words(error)})") from None
        except TimeoutError:
            raise _TryAgain(f"it did not answer {path} within teacher.timeout {self.config.timeout:g} s") from None
        except HTTPError as error:
            raise _TryAgain(f"the connection broke ({_last_words(error)})") from None
        if response.status in AGAIN or (response.status >= 500 and response.status != 501):
            after = response.headers.get("Retry-After")
            raise _TryAgain(f"it answered {path} with {response.status}: {_words(data)}", _seconds(after))
        if response.status != 200:
            raise UserError(self._refusal(path, response.status, _words(data)))
        try:
            return json.loads(data)
        except ValueError:
            raise _TryAgain(f"its answer to {path} is no JSON: {_words(data)!r}") from None

    def _refusal(self, path: str, status: int, words: str) -> str:
        hint = ""
        if status in (401, 403):
            hint = f" Put the server's API key into the environment variable {self.config.api_key_env}."
        elif status == 404:
            hint = " Check teacher.server and teacher.model."
        elif "logprobs" in words and any(word in words for word in ("greater", "max", "exceed")):
            hint = " Start the server with a higher --max-logprobs, or lower scoring.top_k."
        return f"The server {self.url} refuses {path} ({status}): {words}.{hint}".replace("..", ".")

    def _is_away(self, why: str, patience: float) -> None:
        with self._lock:
            if self._away_since is None:
                self._away_since = time.monotonic()
                self.say(f"The server {self.url} can't be used now: {why}. It is asked again for {patience:.0f} s.")

    def _is_back(self) -> None:
        if self._away_since is not None:
            with self._lock:
                since, self._away_since = self._away_since, None
            if since is not None:
                self.say(f"The server {self.url} is back after {time.monotonic() - since:.0f} s.")

    def each(self, ask: Callable[[int], T], count: int) -> list[T]:
        """ask(i) for 0 .. count - 1, `teacher.concurrency` of them at once; the first error ends all.

        Raises:
            RunError: `stop` was called meanwhile, besides whatever `ask` raises.
        """
        self._stop = stop = threading.Event()
        todo, lock = iter(range(count)), threading.Lock()
        done = queue.SimpleQueue[tuple[int, Any, BaseException | None]]()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    i = next(todo, None)
                if i is None:
                    return
                try:
                    done.put((i, ask(i), None))
                except BaseException as error:
                    done.put((i, None, error))

        # Daemons: a request that hangs keeps nobody from ending.
        for n in range(min(count, self.config.concurrency)):
            threading.Thread(target=work, name=f"teacher-{n}", daemon=True).start()
        answers: dict[int, T] = {}
        try:
            while len(answers) < count:
                if stop.is_set():
                    raise RunError("Stopped.")
                try:
                    i, answer, error = done.get(timeout=0.2)
                except queue.Empty:
                    continue
                if error is not None:
                    raise error
                answers[i] = answer
        finally:
            stop.set()
        return [answers[i] for i in range(count)]

    def stop(self) -> None:
        """End what another thread asks now."""
        self._stop.set()

    # -- what can be asked

    def models(self, *, patience: float | None = None) -> dict[str, dict[str, Any]]:
        """The models that it serves, by name, with what it says of them."""
        answer = self.ask("/v1/models", patience=patience)
        try:
            return {str(card["id"]): dict(card) for card in answer["data"]}
        except (TypeError, KeyError):
            raise self._strange("/v1/models", answer) from None

    @property
    def kind(self) -> str:
        """vllm or sglang; a server that does not say is taken for vLLM's."""
        if self._kind is None:
            owners = {card.get("owned_by") for card in self.models().values()}
            self._kind = "sglang" if "sglang" in owners else "vllm"
        return self._kind

    def tokenize(self, text: str) -> list[int] | None:
        """A text's ids, special tokens added as the model's tokenizer does; None where the server has no answer."""
        try:
            answer = self.ask("/tokenize", {"model": self.config.model, "prompt": text}, patience=0)
            return [int(token) for token in answer["tokens"]]
        except (NpdError, TypeError, KeyError, ValueError):
            return None

    def read(self, ids: Sequence[int], start: int, top_k: int) -> list[TokenLogprobs]:
        """What the model says about the tokens ids[start:], start >= 1, at temperature 1, with its top-k at each.

        Raises:
            UserError, RunError: as `ask`, or the answer is not what was asked for.
        """
        if self.kind == "sglang":
            # input_token_logprobs is aligned with ids[logprob_start_len:], and its first entry is always empty.
            path, body = "/generate", {
                "input_ids": list(ids),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": start - 1,
                "top_logprobs_num": top_k,
            }  # fmt: skip
            parse = _sglang_logprobs
        else:
            path, body = "/v1/completions", {
                "model": self.config.model,
                "prompt": list(ids),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": top_k,
            }  # fmt: skip
            parse = _vllm_logprobs
        answer = self.ask(path, body)
        try:
            said = parse(answer, list(ids), start, top_k)
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            raise self._strange(path, answer) from None
        short = min((len(token.top) for token in said), default=top_k)
        if len(said) != len(ids) - start or short < top_k:
            what = (
                f"{len(said)} of {len(ids) - start} tokens" if short >= top_k else f"top {short} where top {top_k} was asked"
            )
            raise UserError(
                f"The server {self.url} gave log-probabilities for {what}. If it caps them, lift the cap (vLLM: "
                f"--max-logprobs {top_k}) or lower scoring.top_k."
            )
        return said

    def write(
        self, ids: Sequence[int], *, max_new_tokens: int, temperature: float, top_p: float, seed: int, stop_ids: Sequence[int]
    ) -> list[int]:
        """The ids that the model writes after a prompt, up to and including a stop token.

        Raises:
            UserError, RunError: as `ask`, or the answer is not what was asked for.
        """
        body: dict[str, Any]
        # Neutral values of all that would else be the server's or the model's own default.
        sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(stop_ids),
        }
        if self.kind == "sglang":  # where ignore_eos would ignore stop_token_ids as well
            sampling |= {"top_k": -1, "max_new_tokens": max_new_tokens, "sampling_seed": seed}
            path, body = "/generate", {"input_ids": list(ids), "sampling_params": sampling}
        else:
            path = "/v1/completions"
            body = sampling | {"top_k": 0, "max_tokens": max_new_tokens, "seed": seed, "ignore_eos": True}
            body |= {"model": self.config.model, "prompt": list(ids), "return_token_ids": True}
        answer = self.ask(path, body)
        try:
            if self.kind == "sglang":
                written = [int(token) for token in answer["output_ids"]]
                stopped = (answer["meta_info"]["finish_reason"] or {}).get("matched")
                if isinstance(stopped, int) and written[-1:] != [stopped]:
                    written.append(stopped)
            else:
                written = [int(token) for token in answer["choices"][0]["token_ids"]]
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            raise self._strange(path, answer) from None
        if not written:
            raise self._strange(path, answer)
        return written[: next((i + 1 for i, token in enumerate(written) if token in stop_ids), len(written))]

    def _strange(self, path: str, answer: Any) -> NpdError:
        return UserError(
            f"The server {self.url} answers {path} with something else than a vLLM or SGLang server does: "
            f"{json.dumps(answer)[:SHOWN]!r}. Check teacher.server, and teacher.api if it is set."
        )


def _vllm_logprobs(answer: Any, ids: list[int], start: int, top_k: int) -> list[TokenLogprobs]:
    entries = answer["choices"][0]["prompt_logprobs"][start:]
    said = []
    for token, entry in zip(ids[start:], entries, strict=True):
        values = {int(key): float(value["logprob"]) for key, value in entry.items()}
        own = values[token]
        # The token itself is there besides the top-k; where it is not among the best, it comes last and is cut off.
        best = sorted(values.items(), key=lambda pair: -pair[1])[:top_k]
        said.append(TokenLogprobs(own, best))
    return said


def _sglang_logprobs(answer: Any, ids: list[int], start: int, top_k: int) -> list[TokenLogprobs]:
    meta = answer["meta_info"]
    own = meta["input_token_logprobs"][1:]
    tops = meta["input_top_logprobs"][1:] if top_k else [[]] * len(own)
    said = []
    for token, (logprob, theirs, *_), top in zip(ids[start:], own, tops, strict=True):
        if theirs != token:
            raise ValueError("log-probabilities of other tokens")
        best = sorted(((int(id_), float(value)) for value, id_, *_ in top), key=lambda pair: -pair[1])
        said.append(TokenLogprobs(float(logprob), best))
    return said


def _words(data: bytes) -> str:
    """What a server says in an answer, in short."""
    text = data.decode("utf-8", "replace")
    try:
        body = json.loads(text)
        error = body.get("error", body)
        message = error.get("message") if isinstance(error, dict) else error
        text = str(message or body.get("detail") or body.get("message") or text)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:SHOWN] or "an empty body"


def _last_words(error: Exception) -> str:
    return str(error).rpartition(": ")[2][:SHOWN]


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, urllib3.Retry().parse_retry_after(retry_after or "0"))
    except HTTPError:
        return 0.0
