"""One way to write a short text: without what only shows it (Markdown, TeX's dollars and boxes), each sign in one spelling.

All of it takes time linear in the text's length, which may be anybody's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

__all__ = ["plain"]

COMPOSED = 10_000  # characters that are brought to NFC, which takes quadratic time for combining marks without end
ROUNDS = 4  # of markup within markup
_FRACTIONS = {
    char: unicodedata.normalize("NFKC", char).replace("⁄", "/")
    for char in map(chr, (*range(0xBC, 0xBF), *range(0x2150, 0x215F)))
}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_WITHIN = r"(?:[^{}]|\{[^{}]*\})*"
_GROUP = rf"\{{{_WITHIN}\}}"
_TOKEN = r"(?:\\[a-zA-Z]+|[^\s{}\\])"  # what a TeX command takes where no brace follows
_INNER = r"[^()]*(?:\([^()]*\)[^()]*){0,9}"

Rule = tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]]
"""Characters of which a text has one where the rule applies ("" for any), what is replaced, and by what."""


def _rules(*rules: tuple[str, str, str | Callable[[re.Match[str]], str]]) -> tuple[Rule, ...]:
    return tuple((signs, re.compile(pattern), instead) for signs, pattern, instead in rules)


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for signs, pattern, instead in rules:
        if not signs or any(sign in text for sign in signs):
            text = pattern.sub(instead, text)
    return text


def _beside(found: re.Match[str]) -> str:
    return " " * found.string[max(0, found.start() - 1)].isdigit() + _FRACTIONS[found[0]]


def _braced(group: str) -> str:
    return group if group[0] == "{" else "{" + group + "}"


# -- characters

_LOOKALIKES = str.maketrans(
    {
        **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\u2066\u2067\u2068\u2069\ufeff\u00ad"),
        **dict.fromkeys("\u2212\ufe63\uff0d\u2010\u2011\u2012", "-"),
        **dict.fromkeys("’‘ʼ′＇", "'"),
        **dict.fromkeys("“”„«»＂", '"'),
        **dict.fromkeys("⁄∕／", "/"),
        **dict.fromkeys("，、", ", "),  # lists; numbers are grouped by the other one
        **dict.fromkeys("【〔「", "("),
        **dict.fromkeys("】〕」", ")"),
        **dict.fromkeys("∅⌀", "∅"),
        "。": ".",
        "｡": ".",
        "⋅": "·",
        "→": "⇒",
        "⩽": "≤",
        "⩾": "≥",
    }
)
_DASHES = _rules(
    ("–", r"(?<!^)–|^–(?=[\d.$€£\\∞])", "-"),
    ("—―", r"(?<=\S) ?[—―] ?(?=\S)", " - "),
    ("º", r"(?<=\d) ?º", "°"),
    ("", r"[\uff01-\uff5e\U0001d400-\U0001d7ff]", lambda found: unicodedata.normalize("NFKC", found[0])),
)


def _typed(text: str) -> str:
    """In the characters of a keyboard, where others look like them; superscripts and fractions mean something."""
    if text.isascii():
        return text
    text = text if len(text) > COMPOSED else unicodedata.normalize("NFC", text)
    return " ".join(_apply(_DASHES, text.translate(_LOOKALIKES)).split())


# -- signs that have more than one name

_STYLES = "bf|rm|it|em|sf|tt|bfseries|itshape|(?:display|text)style|[lL]arge|LARGE|[hH]uge|small"
_NAMES = {
    "pi": "π",
    "infty": "∞",
    "times": "×",
    "cdot": "·",
    "pm": "±",
    "cup": "∪",
    "cap": "∩",
    "in": "∈",
    "lt": "<",
    "gt": ">",
    "varnothing": "∅",
    "emptyset": "∅",
    "lbrace": "\\{",
    "rbrace": "\\}",
}
_SIGNS = _rules(
    ("<", r"</?answer>", ""),  # of a pair that was never closed
    ("\\", r"(?<!\\)\\[,;:] ?(?=[$*]|\\[)\]])", ""),
    ("\\", r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))", " "),
    ("~", r"(?<=\S)~(?=\S)", " "),
    ("\\", r"(?<!\\)\\\\ ?(?=\$|\\[)\]])", ""),
    (
        "\\",
        rf"(?<![a-zA-Z}}\]^_])\{{ ?\\(?:{_STYLES})(?![a-zA-Z]) ?",
        r"\\emph{",
    ),
    (
        "\\",
        r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])|(?<!\\)\\!"
        rf"|\\(?:{_STYLES})(?![a-zA-Z]) ?",
        "",
    ),
    ("\\", r"\^\{?\s?\\circ\s?\}?|\\degree(?![a-zA-Z])", "°"),
    ("°", r"°\s?(?:\\(?:text|mathrm)\s?\{\s?([CF])\s?\}|([CF])(?![a-zA-Z]))", r"°\1\2"),
    ("{", r"\{,\}", ","),
    ("\\", r"(?<!\\)\\([%#&_])", r"\1"),
    ("\\", rf"\\({'|'.join(_NAMES)})(?![a-zA-Z])", lambda found: _NAMES[found[1]]),
    ("\\<", r"\\leq?(?:slant)?(?![a-zA-Z])|<=", "≤"),
    ("\\>", r"\\geq?(?:slant)?(?![a-zA-Z])|>=", "≥"),
    ("\\!", r"\\neq?(?![a-zA-Z])|!=", "≠"),
    ("\\", r"\\(?:to|rightarrow|implies|Rightarrow)(?![a-zA-Z])", "⇒"),
    ("\\", r"\\angle(?![a-zA-Z]) ?", "∠"),
    ("\\", r"(?<=\d)(?: |\\text\{ ?\}){0,2}\\Omega(?![a-zA-Z])", " Ω"),
    ("\\", r"(?<=\d) ?\\mu(?![a-zA-Z]) ?(?:\\(?:text|mathrm) ?\{ ?([a-zA-Z]{1,3})\}|([a-zA-Z]{1,3})(?![a-zA-Z]))", r" µ\1\2"),
    # a fraction of units
    (
        "\\",
        r"(?<=[\d}\s])\\[dtc]?frac ?\{ ?\\(?:text|mathrm) ?\{([^{}\d]{1,40})\} ?\}"
        r" ?\{ ?\\(?:text|mathrm) ?\{([^{}\d]{1,40})\} ?\}",
        lambda found: f"\\text{{ {found[1].strip()}/{found[2].strip()}}}",
    ),
    # a plain number in a box inside of an expression; whatever else there is in one stays a group
    ("\\", r"(?<![\w}.,)])(?<![\w}.,)]\s)\\boxed\s?\{(-?[\d.,/]+)\}(?![\w{(^_!/]|\s?[.,]\d)", r"\1"),
    ("\\", r"\\boxed\s?\{", "{"),
)

# -- what only shows a text

_MARKUP = _rules(
    ("$", r"(?<!\\)\$\$ ?([^$]*[^\s$\\]) ?\$\$", r"\1"),
    ("$", r"(?<!\\)(\$\$?)(?=\S)([^$]*[^\s$\\])\1(?!\d)", r"\2"),  # Pandoc's rule for what is TeX between dollars
    ("\\", r"(?<!\\)\\[()\[\]]", ""),
    ("*`", r"(?<![\w)])(\*{2,3})(?=\S)([^*]*[^\s*])\1(?![\w(])|`", r"\2"),  # Markdown
    ("*", r"^\*{1,3}(?=[^\s*][^*]*$)", ""),  # of emphasis that ends elsewhere
    ("#", r"^#{1,6} (?=\S)", ""),
    ("*", r"(?<![.\s])\.?\*{1,3}$", ""),
    ("", r"(?:\\\\|(?<=[^.\\])\.|(?<=[^\\])[,;]|(?<=\\\\)[.,;]| )$", ""),  # but no dot of an ellipsis
    ("=", r"^= ?(?=[^=])", ""),
)
_QUOTES = {'"': '"', "'": "'", "*": "*", "_": "_"}
_WRAPPER = re.compile(
    r"\\(?:(text(?:bf|rm|it|sf|tt|sc|md|up|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|emph|underline)"
    r"|boldsymbol|bm|operatorname\*?|fbox|mathnormal)\s?\{|\\[{}\\]|[{}]"
)
_TAKES = re.compile(r"(?:[\^_]|\\(?:sqrt|[dtc]?frac)) ?$")  # one group


def _bare(text: str) -> str:
    """Without markup around it, in what order it may be nested."""
    for _ in range(ROUNDS):
        before = text
        text = _unwrapped(_apply(_MARKUP, text))
        if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
            text = text[1:-1].strip()
        elif re.fullmatch(r"__[^_]*[^_a-z][^_]*__", text):  # but no __name__ of Python's
            text = text[2:-2].strip()
        if text == before:
            break
    return text


def _unwrapped(text: str) -> str:
    """Without \\text{} and the like around a part; digits on both sides of a brace do not become one number."""
    if "\\" not in text or "{" not in text:
        return text
    pieces, closing, at = [], list[str](), 0
    for found in _WRAPPER.finditer(text):
        token, start, end = found[0], found.start(), found.end()
        pieces.append(text[at:start])
        at = end
        shown = token
        if token == "}":
            if not closing:
                return text
            shown = closing.pop() or "{}" * (text[start - 1].isdigit() and text[end : end + 1].isdigit())
        elif token == "{":
            closing.append("}")
        elif token[-1] == "{" and token != "\\{":
            kept = start > 1 and _TAKES.search(text[max(0, start - 8) : start]) is not None
            closing.append("}" if kept else "")
            before = text[max(0, start - 1) : start]
            shown = "{" if kept else "{}" if before.isdigit() and text[end : end + 1].isdigit() else ""
            if not shown and before == "}" and "".join(pieces[-3:])[-1:].isdigit() and text[end : end + 1].isdigit():
                shown = "{}"
            shown = shown or (" " if found[1] and (before.isdigit() or before in tuple("}°π")) else "")
        pieces.append(shown)
    return text if closing else "".join(pieces) + text[at:]


# -- numbers, fractions and roots

_FORMS = _rules(
    ("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: "^{" + found[0].translate(_RAISED) + "}"),
    ("".join(_FRACTIONS), "[" + "".join(_FRACTIONS) + "]", _beside),
    ("^", r"(\d) ?(?:[×·*]|x(?= ?10\^)) ?10\^\{?([-+]?\d{1,9})\}?(?!\d)", r"\1e\2"),
    ("^", r"(?<![\w.,^}{/)])10\^(?:\{([-+]?\d{1,9})\}|([-+]?\d{1,9}))(?![\d.}!^])", r"1e\1\2"),
    ("{}", r"(?<=\{) {1,9}| {1,9}(?=\})|(?<=\}) {1,9}(?=\{)", ""),
    ("\\", r"\\[dtc]?frac(?![a-zA-Z])", r"\\frac"),
    (
        "\\",
        rf"\\frac\s?({_GROUP}|{_TOKEN})\s?({_GROUP}|{_TOKEN})",
        lambda found: "\\frac" + _braced(found[1]) + _braced(found[2]),
    ),
    ("q", rf"(?<![a-zA-Z])\\?sqrt ?\(({_INNER})\)", r"\\sqrt{\1}"),
    ("\\", rf"\\sqrt(?![a-zA-Z\[])\s?({_GROUP}|{_TOKEN})", lambda found: "\\sqrt" + _braced(found[1])),
    ("√", rf"√ ?\(({_INNER})\)", r"\\sqrt{\1}"),
    # a whole number or a letter, unless what follows might belong to it
    ("√", r"√ ?(?:(\d+)(?![\w.,^(\\√!°]|\{)|([^\W\d_])(?![\w.^(\\√!'])|\{([^{}]*)\})", r"\\sqrt{\1\2\3}"),
    ("p", r"(?:^|(?<=[\d+*/(=-])) ?pi(?![a-zA-Z])", "π"),
)
_HOPE = re.compile(r"[.,;]? I hope (?:it|this) (?:is correct|helps)$", re.IGNORECASE)  # the prompt of Minerva's evaluation


def plain(text: str) -> str:
    """A text without what only shows it: spaces, dollars, Markdown, quotes and a full stop at its end."""
    text = _typed(" ".join(text.split()))
    text = _HOPE.sub("", text.removesuffix("."))
    text = " ".join(_bare(_apply(_SIGNS, text)).split())
    return _bare(" ".join(_apply(_FORMS, text).split())).replace("\\$", "$")
