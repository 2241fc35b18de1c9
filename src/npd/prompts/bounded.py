"""Chat templates within bounds: a template is a program that came with a model, and may compute or write for ever.

transformers renders in jinja's sandbox, which keeps a template from doing anything but that. Here the sandbox also counts:
every turn of a loop, call and filter looks at the time, and what makes text says beforehand how much it will be. It needs
neither signals nor threads, so it works wherever a template is rendered.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:  # to read a run's files, nobody should wait for transformers
    from transformers import PreTrainedTokenizerBase

SECONDS = 2.0  # of a processor, for one conversation
MOST = 1 << 28  # characters in all texts that are made for one conversation, those in between too
LONGEST = 1 << 18  # characters of a template
BITS = 4096  # of an integer
WIDEST = 1 << 16  # columns that a text is filled up to
WIDE = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "tojson"}
# What makes a text of a list or an object, with all that is in it.
TEXT = {"string", "tojson", "pprint", "join", "urlencode", "xmlattr", "escape", "e", "forceescape", "upper", "lower", "trim"}
TEXT |= {"replace", "indent", "center", "wordwrap", "title", "capitalize", "striptags", "urlize", "truncate", "safe"}
FIELD = re.compile(r"%[-+ #0]*(?:\*|\d{6}|\d*\.(?:\*|\d{6}))|\{[^{}]*\d{6}")


class TooMuch(TemplateRuntimeError):
    """A template passed its bounds; the message goes on from "the chat template"."""


class _Spent(threading.local):
    """What the rendering of this thread may still take; nothing is counted outside of one."""

    until: float | None = None
    left = MOST


_spent = _Spent()


def tick() -> None:
    """See that there is time left."""
    if _spent.until is not None and time.thread_time() > _spent.until:
        raise TooMuch(f"computes for more than {SECONDS:g} seconds")


def spend(characters: int) -> None:
    """See that so much more text may be made."""
    if _spent.until is not None:
        _spent.left -= characters
        if _spent.left < 0:
            raise TooMuch(f"makes more than {MOST:,} characters of text")


def _size(*values: Any) -> int:
    """Characters of values written out, about; counted no further than there are left."""
    left, total, turns = list(values), 0, 0
    while left:
        value = left.pop()
        turns += 1
        if not turns % 1024:
            tick()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            total += 8 + 8 * len(value)
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            total += 8 + 8 * len(value)
            left += value
        else:
            total += 8
        if total > MOST:
            break
    return total


def _foresee(name: str, values: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """See that a method of a text or a filter may make what it will make of its first value and the rest."""
    tick()
    first, *rest = values or ("",)
    if name in WIDE and any(isinstance(n, int) and abs(n) > WIDEST for n in (*rest, *options.values())):
        raise TooMuch(f"asks `{name}` for a text of more than {WIDEST:,} columns")
    if name in TEXT and not isinstance(first, str):
        spend(_size(first))
    if name == "replace" and isinstance(first, str) and len(rest) > 1:
        spend(first.count(str(rest[0])) * len(str(rest[1])))
    elif name == "join" and isinstance(first, str):  # the method, whose text is what stands between
        items = rest[0] if rest and isinstance(rest[0], list | tuple) else ()
        spend(len(first) * len(items) + _size(*items))
    elif name == "join" and hasattr(first, "__len__"):
        spend(_size(*rest, *options.values()) * len(first))
    elif name == "indent":
        spend(str(first).count("\n") * _size(*rest, *options.values()))
    elif name in ("format", "format_map"):
        if FIELD.search(str(first)) or any(isinstance(n, int) and abs(n) > WIDEST and "{" in str(first) for n in rest):
            raise TooMuch(f"asks `{name}` for fields of more than {WIDEST:,} columns")
        spend(max(str(first).count("%"), str(first).count("{")) * _size(*rest, *options.values()))


def _count(value: Any) -> Any:
    """A value that was made, counted."""
    if isinstance(value, str):
        spend(len(value))
    elif isinstance(value, list | tuple):
        spend(8 * len(value))
    elif isinstance(value, int) and value.bit_length() > BITS:
        raise TooMuch(f"makes an integer of more than {BITS:,} bits")
    return value


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test that counts."""
    own = hasattr(function, "jinja_pass_arg")  # its first argument is jinja's own

    @functools.wraps(function)
    def watched(*args: Any, **options: Any) -> Any:
        if name == "join" and len(args) > own and not hasattr(args[own], "__len__"):  # to be counted before it is joined
            args = (*args[:own], list(args[own]), *args[own + 1 :])
        _foresee(name, args[own:], options)
        return _count(function(*args, **options))

    return watched


class _Watched(dict[str, Callable[..., Any]]):
    """Filters or tests by name, each of which counts."""

    def __init__(self, functions: Mapping[str, Any]) -> None:
        super().__init__()
        for name, function in functions.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _watched(name, function))


class _Generator(CodeGenerator):
    """Writes `a ~ b` as a call of the environment."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined(context.eval_ctx.autoescape, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Bounded(ImmutableSandboxedEnvironment):
    """The sandbox that transformers compiles templates in, counting."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    tick = staticmethod(tick)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, finalize=_written, **options)
        self.filters: dict[str, Any] = _Watched(self.filters)
        self.tests: dict[str, Any] = _Watched(self.tests)
        del self.globals["lipsum"]  # writes as much as it is asked for

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            line = loop.lineno
            looks = nodes.Call(nodes.EnvironmentAttribute("tick", lineno=line), [], [], None, None, lineno=line)
            loop.body.insert(0, nodes.ExprStmt(looks, lineno=line).set_environment(self))
        return tree

    def concat(self, pieces: Iterable[str]) -> str:
        made = []
        for piece in pieces:
            spend(len(piece))
            made.append(piece)
        return "".join(made)

    def joined(self, escape: bool, parts: tuple[Any, ...]) -> str:
        spend(_size(*parts))
        return str(markup_join(parts)) if escape else str_join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        tick()
        if operator == "%" and isinstance(left, str):
            _foresee("format", (left, *(right if isinstance(right, tuple) else (right,))), {})
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(many, str | list | tuple):
                    spend(max(0, times) * (len(many) if isinstance(many, str) else 8 * len(many)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > BITS:
            raise TooMuch(f"makes an integer of more than {BITS:,} bits")
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            spend(len(left) + len(right))
            return left + right
        return _count(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        _foresee(name, (owner, *args) if isinstance(owner, str) else ("", *args), options)
        return _count(super().call(__context, __obj, *args, **options))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format = super().wrap_str_format(value)
        if format is None:
            return None

        def counted(*args: Any, **options: Any) -> str:
            _foresee("format", (value.__self__, *args), options)
            return str(_count(format(*args, **options)))

        return functools.update_wrapper(counted, format)


def _written(value: Any) -> Any:
    """A value that is about to be written out."""
    if not isinstance(value, str):
        spend(_size(value))
    return value


@functools.cache
def _install() -> None:
    """Make transformers compile templates in this sandbox from now on."""
    from transformers.utils import chat_template_utils

    library: Any = chat_template_utils
    library.ImmutableSandboxedEnvironment = Bounded
    library._compile_jinja_template.cache_clear()


@contextmanager
def _bounds() -> Iterator[None]:
    before = _spent.until, _spent.left
    _spent.until, _spent.left = time.thread_time() + SECONDS, MOST
    try:
        yield
    finally:
        _spent.until, _spent.left = before


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    """A conversation as a tokenizer's chat template writes it; `options` are those of `apply_chat_template`.

    Raises:
        TooMuch: it would take too long, or be too long.
        Exception: whatever the template's own code raises.
    """
    if len(str(tokenizer.chat_template or "")) > LONGEST:
        raise TooMuch(f"has more than {LONGEST:,} characters")
    _install()
    with _bounds():
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
