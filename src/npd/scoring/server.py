"""A model behind HTTP: vLLM's or SGLang's server, asked in token ids.

What can be asked again is asked again, for as long as the configuration says: a connection that is refused or breaks, a
time-out, an answer that is no JSON, and the statuses 408, 429 and 5xx. Every other 4xx ends the work at once. The loop is our
own, not urllib3's Retry: that one counts tries where seconds are promised, sleeps where nobody can stop it, tells nobody that
the server is away, and never sees an answer's JSON.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from npd.config import TeacherConfig
from npd.errors import NpdError, RunError, UserError
from npd.scoring.transport import LEAST_BODY, Answer, Transport, TryAgain
from npd.store.answers import LEAST, LEAST_BEST, ROUNDING, wrong_top

LONGEST_PAUSE = 30.0  # seconds between tries
AGAIN = (408, 429)  # besides all of 5xx but 501
ENTRY = 512  # bytes that one log-probability, or one token, may have in an answer; a hundred is usual
# What reading an answer of another shape may end in.
ODD = (TypeError, KeyError, IndexError, ValueError, AttributeError, ArithmeticError)

T = TypeVar("T")


class TokenLogprobs(NamedTuple):
    """What a model says about one token of a text."""

    logprob: float
    """Natural log of the token's own probability."""
    top: list[tuple[int, float]]
    """(id, log-probability), best first."""


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
        self.transport = Transport(config, self.url)

    # -- asking

    def ask(self, path: str, body: dict[str, Any] | None = None, *, patience: float | None = None, entries: int = 0) -> Any:
        """The JSON that the server answers to a GET, or to a POST of `body`.

        Args:
            patience: seconds to try again for; None: as configured.
            entries: log-probabilities or tokens that the answer may have: what is far longer is given up.

        Raises:
            UserError: the server refuses what was asked; its words are in the message.
            RunError: it does not answer for too long.
        """
        patience = self.config.retry_seconds if patience is None else patience
        began, tries, stop = time.monotonic(), 0, self._stop
        while True:
            try:
                answer = self._once(path, body, LEAST_BODY + ENTRY * entries)
            except TryAgain as error:
                tries += 1
                pause = max(error.after, random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, 2.0 ** min(tries - 1, 9)))
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

    def _once(self, path: str, body: dict[str, Any] | None, most: int) -> Any:
        answer = self.transport.request(path, body, most)
        if answer.status in AGAIN or (answer.status >= 500 and answer.status != 501):
            raise TryAgain(f"it answered {path} with {answer.status}: {self._message(answer)}", answer.after)
        if answer.status != 200:
            raise UserError(self._refusal(path, answer.status, self._message(answer)))
        try:
            return json.loads(answer.data)
        except (ValueError, RecursionError):
            raise TryAgain(f"its answer to {path} is no JSON: {self._message(answer)!r}") from None

    def _message(self, answer: Answer) -> str:
        """What a server says in an answer, in short."""
        text: object = answer.data.decode("utf-8", "replace")
        try:
            body = json.loads(answer.data)
            error = body.get("error", body)
            message = error.get("message") if isinstance(error, dict) else error
            text = message or body.get("detail") or body.get("message") or text
        except (ValueError, AttributeError, RecursionError):
            pass
        return self.transport.words(text) or "an empty body"

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
            return {_text(card["id"]): dict(card.items()) for card in answer["data"]}
        except ODD as error:
            raise self._strange("/v1/models", answer, error) from None

    @property
    def kind(self) -> str:
        """vllm or sglang; a server that does not say is taken for vLLM's."""
        if self._kind is None:
            owners = [card.get("owned_by") for card in self.models().values()]
            self._kind = "sglang" if "sglang" in owners else "vllm"
        return self._kind

    def tokenize(self, text: str, *, special: bool = True) -> list[int] | None:
        """A text's ids, with `special` tokens added as the model's tokenizer does; None where the server has no answer."""
        return self._tokenized({"prompt": text} | ({} if special else {"add_special_tokens": False}))

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> list[int] | None:
        """The ids of a conversation as the server's own chat template asks it; None where it has no answer."""
        asked = {"messages": list(messages), "add_generation_prompt": True}
        return self._tokenized(asked | ({"chat_template_kwargs": dict(options)} if options else {}))

    def _tokenized(self, what: dict[str, Any]) -> list[int] | None:
        try:
            answer = self.ask("/tokenize", {"model": self.config.model} | what, patience=0)
            return [_id(token) for token in answer["tokens"]]
        except (NpdError, *ODD):
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
        answer = self.ask(path, body, entries=len(ids) * (top_k + 2))
        try:
            said = parse(answer, list(ids), start, top_k)
        except _Impossible as error:
            raise self._impossible(path, len(ids) - start, start, str(error)) from None
        except ODD as error:
            raise self._strange(path, answer, error) from None
        short = min((len(token.top) for token in said), default=top_k)
        if short < top_k:
            raise UserError(
                f"The server {self.url} gave log-probabilities for top {short} where top {top_k} was asked. If it caps them, "
                f"lift the cap (vLLM: --max-logprobs {top_k}) or lower scoring.top_k."
            )
        if (wrong := _nonsense(said, top_k)) is not None:
            raise self._impossible(path, len(said), start, wrong)
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
        answer = self.ask(path, body, entries=len(ids) + 2 * max_new_tokens)
        try:
            if self.kind == "sglang":
                written = [_id(token) for token in answer["output_ids"]]
                stopped = (answer["meta_info"]["finish_reason"] or {}).get("matched")
                if type(stopped) is int and written[-1:] != [stopped]:
                    written.append(_id(stopped))
            else:
                choice = answer["choices"][0]
                if choice.get("prompt_token_ids") not in (None, list(ids)):
                    raise _Odd("it read other tokens than were sent")
                written = [_id(token) for token in choice["token_ids"]]
            if not 0 < len(written) <= max_new_tokens:
                raise ValueError(f"{len(written)} tokens, where 1 to {max_new_tokens} were asked")
        except ODD as error:
            raise self._strange(path, answer, error) from None
        return written[: next((i + 1 for i, token in enumerate(written) if token in stop_ids), len(written))]

    def _impossible(self, path: str, tokens: int, start: int, what: str) -> NpdError:
        return UserError(
            f"The server {self.url} answers {path} with what no model can say of {tokens} tokens behind {start}: {what}. "
            "Nothing of it is kept.",
            "See to the server (its weights, their quantisation, its version), then run the same command again.",
        )

    def _strange(self, path: str, answer: Any, why: Exception) -> NpdError:
        seen = f"{why}; " if isinstance(why, _Odd) else ""
        return UserError(
            f"The server {self.url} answers {path} with something else than a vLLM or SGLang server does "
            f"({seen}{self.transport.words(answer)!r}). Check teacher.server, and teacher.api if it is set."
        )


class _Odd(ValueError):
    """Something in an answer that can't stand there; the message says what."""


class _Impossible(_Odd):
    """A number that no model can give."""


def _odd(value: object, what: str) -> _Odd:
    return _Odd(f"a {type(value).__name__} where {what} should be")


def _text(value: object) -> str:
    if type(value) is not str:
        raise _odd(value, "a name")
    return value


def _id(value: object) -> int:
    """A token's id: a whole number, which `true` and 0.7 are not."""
    if type(value) is not int:
        raise _odd(value, "a token's id")
    if not 0 <= value < 1 << 31:
        raise _Odd("a token's id that no vocabulary has")
    return value


def _key(text: str) -> int:
    """A token's id that is written as a name, in the one way it can be."""
    if len(text) > 10 or str(int(text)) != text:
        raise _Odd("a token's id that is no whole number")
    return _id(int(text))


def _logprob(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise _odd(value, "a log-probability")
    if not LEAST <= value <= ROUNDING:  # nor if it is no number
        raise _Impossible(f"{float(value):g} as a log-probability")
    return float(value)


def _nonsense(said: list[TokenLogprobs], top_k: int) -> str | None:
    """What no model can say, if anything; what is right up to rounding is not."""
    own = np.array([token.logprob for token in said])
    if not len(own) or not top_k:
        return None
    pairs = np.array([token.top for token in said], np.float64).reshape(len(said), top_k, 2)
    ids, logprobs = pairs[..., 0].astype(np.int64), pairs[..., 1]
    if (wrong := wrong_top(ids, logprobs)) is not None:
        return wrong
    if logprobs[:, 0].min() < LEAST_BEST:
        return f"{logprobs[:, 0].min():g} as the log-probability of the most likely token"
    if (own > logprobs[:, 0] + ROUNDING).any():
        return "a token that is more likely than the most likely one"
    return None


def _vllm_logprobs(answer: Any, ids: list[int], start: int, top_k: int) -> list[TokenLogprobs]:
    entries = answer["choices"][0]["prompt_logprobs"]
    if len(entries) != len(ids):
        raise _Odd(f"{len(entries)} tokens where {len(ids)} were asked about")
    said = []
    for token, entry in zip(ids[start:], entries[start:], strict=True):
        values = {_key(key): _logprob(value["logprob"]) for key, value in entry.items()}
        if token not in values:
            raise _Odd("log-probabilities of other tokens")
        own = values[token]
        # The token itself is there besides the top-k; where it is not among the best, it comes last and is cut off.
        best = sorted(values.items(), key=lambda pair: -pair[1])[:top_k]
        said.append(TokenLogprobs(own, best))
    return said


def _sglang_logprobs(answer: Any, ids: list[int], start: int, top_k: int) -> list[TokenLogprobs]:
    meta = answer["meta_info"]
    own = meta["input_token_logprobs"][1:]
    tops = meta["input_top_logprobs"][1:] if top_k else [[]] * len(own)
    if not len(own) == len(tops) == len(ids) - start:
        raise _Odd(f"{len(own)} tokens and {len(tops)} top-k where {len(ids) - start} were asked about")
    said = []
    for token, (logprob, theirs, *_), top in zip(ids[start:], own, tops, strict=True):
        if _id(theirs) != token:
            raise _Odd("log-probabilities of other tokens")
        best = sorted(((_id(id_), _logprob(value)) for value, id_, *_ in top), key=lambda pair: -pair[1])[:top_k]
        said.append(TokenLogprobs(_logprob(logprob), best))
    return said
