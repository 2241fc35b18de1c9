"""Do two short texts say the same answer? Quantities by value, lists by their members, choices by their letter, else as text.

A wrong answer that is called right teaches the wrong thing, a right one that is called wrong costs a sample. So what was said
is read whole, by a small grammar (`npd.quantities`, and the forms below), or compared as text; what can be read in two ways
is called wrong. All of it takes time linear in the texts' length: they are untrusted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from npd.quantities import (
    CHANGING,
    DENYING,
    NAME,
    NUMBER,
    TAIL,
    Quantity,
    decimal,
    quantity,
    same_quantity,
    unit_of,
)

__all__ = ["plain", "same_answer"]


def same_answer(said: str, answer: str, marked: bool = True) -> bool:
    """Is what was said the right answer?

    Quantities are equal by value: 1/2, \\frac{1}{2}, ½ and 0.5; 10,000, 10 000 and 10'000; 3 \\times 10^5. Units and nouns
    count where both sides have them. 50% is 50, as in MATH's own normalisation, and 0.5 too, as in math-verify. Before a
    quantity may stand words that only lead to it ("so the total is"), or an equation that ends with it.

    Args:
        marked: was what was said marked as the answer? Of a line of prose the last sentence is read.
    """
    said, answer = plain(said), plain(answer)
    if not answer:
        return False
    if said == answer:
        return True
    if not marked:
        said = re.split(r"(?<=[^\W_][.!?:])(?<!^[A-Za-z][.:]) ", said[-LONGEST:])[-1]
    right = quantity(answer)
    if right is not None:
        mine = _said_quantity(said)
        return mine is not None and same_quantity(mine, right)
    return _same_form(said, answer)


# -- text: ways to write the same

LONGEST = 1000  # characters that are read as a sentence, or as members; longer ones are compared as text
_FRACTIONS = {
    char: unicodedata.normalize("NFKC", char).replace("⁄", "/")
    for char in map(chr, (*range(0xBC, 0xBF), *range(0x2150, 0x215F)))
}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_WITHIN = r"(?:[^{}]|\{[^{}]*\})*"
_GROUP = rf"\{{{_WITHIN}\}}"
_TOKEN = r"(?:\\[a-zA-Z]+|[^\s{}\\])"  # what a TeX command takes where no brace follows
_REPLACED = (
    (re.compile("[\u2212\ufe63\uff0d]"), "-"),  # minus signs
    (re.compile(r"</?answer>"), ""),  # of a pair that was never closed
    (re.compile(r"(?<!\\)\$\$ ?([^$]*[^\s$\\]) ?\$\$"), r"\1"),
    (re.compile(r"(?<!\\)(\$\$?)(?=\S)([^$]*[^\s$\\])\1(?!\d)"), r"\2"),  # Pandoc's rule for what is TeX between dollars
    (re.compile(r"(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|(?<=\S)~(?=\S)"), " "),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\u200b"), ""),
    (re.compile(r"\^\{?\s?\\circ\s?\}?"), "°"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\pi(?![a-zA-Z])"), "π"),
    (re.compile(r"\\infty(?![a-zA-Z])"), "∞"),
    (re.compile(r"\\times(?![a-zA-Z])"), "×"),
    (re.compile(r"\\cdot(?![a-zA-Z])|⋅"), "·"),
    (re.compile(r"\\leq?(?![a-zA-Z])|<="), "≤"),
    (re.compile(r"\\geq?(?![a-zA-Z])|>="), "≥"),
    (re.compile(r"\\neq?(?![a-zA-Z])|!="), "≠"),
    (re.compile(r"\\(?:to|rightarrow|implies|Rightarrow)(?![a-zA-Z])|→"), "⇒"),
    # a plain number in a box inside of an expression; whatever else there is in one stays a group
    (re.compile(r"(?<![\w}.,)])(?<![\w}.,)]\s)\\boxed\s?\{(-?[\d.,/]+)\}(?![\w{(^_!/]|\s?[.,]\d)"), r"\1"),
    (re.compile(r"\\boxed\s?\{"), "{"),
    (re.compile(rf"(?<=[\d}}°π])\s?\\(?:text|textbf|textrm|mathrm|mathbf)\s?\{{({_WITHIN})\}}"), r" \1"),
    (re.compile(rf"\\(?:text|textbf|textrm|mathrm|mathbf|boldsymbol|operatorname|fbox)\s?\{{({_WITHIN})\}}"), r"\1"),
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+"), lambda found: "^{" + found[0].translate(_RAISED) + "}"),
    (re.compile("[" + "".join(_FRACTIONS) + "]"), lambda found: _beside(found, _FRACTIONS[found[0]])),
    (re.compile(r"(\d) ?(?:[×·*]|x(?= ?10\^)) ?10\^\{?([-+]?\d{1,9})\}?(?!\d)"), r"\1e\2"),
    (re.compile(r"(?<![\w.,^}{/)])10\^(?:\{([-+]?\d{1,9})\}|([-+]?\d{1,9}))(?![\d.}!^])"), r"1e\1\2"),
    (re.compile(r"(?<![\w)])(\*{2,3})(?=\S)([^*]*[^\s*])\1(?![\w(])|`"), r"\2"),  # Markdown
    (re.compile(r"^\*{1,3}(?=[^\s*][^*]*$)"), ""),  # of emphasis that ends elsewhere
    (re.compile(r"(?<=\{) {1,9}| {1,9}(?=\})|(?<=\}) {1,9}(?=\{)"), ""),
    (re.compile(r"\\[dtc]?frac(?![a-zA-Z])"), r"\\frac"),
    (
        re.compile(rf"\\frac\s?({_GROUP}|{_TOKEN})\s?({_GROUP}|{_TOKEN})"),
        lambda found: "\\frac" + _braced(found[1]) + _braced(found[2]),
    ),
    (re.compile(rf"(?:\\sqrt(?![a-zA-Z\[])|√)\s?({_GROUP}|{_TOKEN})"), lambda found: "\\sqrt" + _braced(found[1])),
)


def _beside(found: re.Match[str], fraction: str) -> str:
    return " " * found.string[max(0, found.start() - 1)].isdigit() + fraction


def _braced(group: str) -> str:
    return group if group[0] == "{" else "{" + group + "}"


_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "*": "*"}
_HOPE = re.compile(r"[.,;]? I hope (?:it|this) (?:is correct|helps)$", re.IGNORECASE)  # the prompt of Minerva's evaluation


def plain(text: str) -> str:
    """A text without what only shows it: spaces, dollars, Markdown, quotes and a full stop at its end."""
    text = " ".join(text.split())
    for pattern, instead in _REPLACED:
        text = pattern.sub(instead, text)
    text = _HOPE.sub("", " ".join(text.split()).removesuffix(".").removesuffix("。"))
    text = re.sub(r"(?<![.\s])(?:\.?\*{1,3}|\.)$", "", text)
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
        text = text if text.endswith("..") else text.removesuffix(".")
    return text


# -- sentences that end with a quantity

_SUBJECTS = (
    "answer|result|total|sum|value|number|amount|product|difference|quotient|remainder|solution|area|perimeter|volume|length|"
    "width|height|distance|time|age|speed|probability|average|mean|median|count|cost|price|profit|change|rate|weight"
)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|finally|now|in total|altogether|overall|in all|in conclusion|final answer),? |"
    r"(?:the|a|our|my|this|that|it|there|which|we|i|he|she|they|you|final|correct|exact|whole|grand|"
    r"is|are|was|were|will be|must be|has|have|had|get|gets|obtain|find|needs?|makes?|made|gives?|equals?|equal to|"
    r"takes?|took|earns?|earned|pays?|paid|costs?|spends?|spent|saves?|saved|sells?|sold|buys?|bought|eats?|ate|uses?|used|weighs?|"
    r"received?|simply|just|exactly|clearly|indeed|here|to (?:the|this|your) (?:problem|question|equation|puzzle|exercise)|"
    rf"comes to|adds up to|total of|therefore|{_SUBJECTS}):? |[:=] )+",
    re.IGNORECASE,
)
_OF = re.compile(r"(?<= )of ((?:[a-z]{1,20} ){1,5}?)(?=(?:is|are|was|were|equals|will be) )", re.IGNORECASE)
_BECAUSE = re.compile(r",? (?:because|since) ")
_ARITHMETIC = re.compile(r"(?:\d,\d{3}(?!\d)|[-+*/×·÷().\d\s{}^%$€£¥₹°]|\\(?:frac|sqrt|div)(?![a-zA-Z]))+")


def _said_quantity(said: str) -> Quantity | None:
    if len(said) > LONGEST:
        return None
    head, _, because = said.partition(found[0]) if (found := _BECAUSE.search(said)) else (said, "", "")
    number = quantity(head) or _after_words(head) or _end_of_equation(head)
    return number if number is None or not found or _agrees(because, number) else None


def _after_words(said: str) -> Quantity | None:
    """Behind words that only lead to it, all of which are known."""
    said = _OF.sub(lambda found: "" if DENYING.isdisjoint(found[1].casefold().split()) else found[0], said)
    lead = _LEAD.match(said)
    return None if lead is None else quantity(said[lead.end() :]) or _end_of_equation(said[lead.end() :])


def _end_of_equation(said: str) -> Quantity | None:
    """x = 3 + 4 = 7, or 48 clips / 2 = 24 clips: what it is of is a name, or computed of numbers alone."""
    _, arrow, said = said.rpartition("⇒")
    first, *others = (part.strip() for part in said.split("="))
    if not others or (arrow and not _.strip()):
        return None
    last = quantity(others[-1])
    named = bool(NAME.fullmatch(first)) and first.casefold() not in CHANGING
    between = others[:-1] if named else [first, *others[:-1]]
    if last is None or not all(_computed(part, named) for part in between):
        return None
    if any((number := quantity(part)) is not None and not same_quantity(number, last) for part in between):
        return None
    return Quantity(last.value, last.percent, last.unit, last.glued, first if named else "")


def _computed(part: str, variables: bool) -> bool:
    """Is it made of numbers and signs, of things that are counted, and maybe of variables?"""
    rest = re.sub(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])|π", "", part) if variables else part
    rest = re.sub(r"(?<=\d )[a-zA-Z]{2,20}", lambda found: "" if unit_of(found[0]) else found[0], rest)
    return bool(part) and _ARITHMETIC.fullmatch(rest) is not None


_TURNING = DENYING | {
    "but",
    "wait",
    "actually",
    "instead",
    "rather",
    "however",
    "although",
    "though",
    "if",
    "else",
    "yes",
    "answer",
}


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?", text.casefold()))


def _turns(text: str) -> bool:
    """Do words take back what was said before them?"""
    return any(word in _TURNING or word.endswith(("n't", "n’t")) for word in _words(text))


def _agrees(because: str, number: Quantity) -> bool:
    """Is it a reason of one clause whose last number, if it has any, is the same again?"""
    numbers = list(NUMBER.finditer(because))
    last = decimal(numbers[-1][0]) if numbers else number.value
    return not re.search(r"[.:;!?]", because) and not _turns(because) and last is not None and last == number.value


# -- other forms

_CHOICE = re.compile(
    r"(?:(?:the |correct |right |final ){0,3}(?:option|choice|answer)(?: is)?:? )?[(\[]?([a-z])(?:[)\].:]{1,2}(?: (.*))?)?",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_CHOICE = re.compile(r"(?<![\w'’])(?:[b-hj-zB-HJ-Z](?![\w'’])|[(\[]?[a-zA-Z][)\]]|A(?! \w))")
_WORD = re.compile(
    r"(yes|no|true|false)(?:(?:,|, (?:as|because|since|it|they|he|she|this|that|there|the|we)) (.*))?", re.DOTALL
)
_AGAINST = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
MOST = 64  # members of a list that are compared one by one
DEEPEST = 4  # lists in each other


def _same_form(said: str, answer: str) -> bool:
    if (right := _CHOICE.fullmatch(answer)) and right[2] is None:
        mine = _CHOICE.fullmatch(said)
        return mine is not None and _same_letter(mine[1], right[1]) and not (mine[2] and not _is_option(right[1], mine[2]))
    if (word := answer.casefold()) in _AGAINST:
        found = _WORD.fullmatch(said.casefold())
        return found is not None and found[1] == word and not (found[2] and _takes_back(word, found[2]))
    return _same_members(said, answer, 0) or any(_same_text(text, answer) for text in _without_name(said, answer))


def _same_letter(said: str, right: str) -> bool:
    """Choices in any case; of variables r is not R."""
    return said == right or (said.casefold() == right.casefold() and right.casefold() in "abcdefgh")


def _is_option(letter: str, behind: str) -> bool:
    """Is what stands behind a choice its text, and no word on the choice or another one?"""
    return (
        letter.casefold() in "abcdefgh"
        and not _OTHER_CHOICE.search(behind)
        and not _turns(behind)
        and not behind.startswith("is ")
    )


def _takes_back(word: str, behind: str) -> bool:
    words = _words(behind)
    if word in ("no", "false"):  # it is not
        words -= {"not", "no", "never", "false", "cannot", "wrong", "incorrect"}
        words = {other for other in words if not other.endswith(("n't", "n’t"))}
    return (
        bool(re.search(r"[.:;!?]", behind))
        or _turns(" ".join(words))
        or not words.isdisjoint({"yes", "true", _AGAINST[word]} - {word})
    )


def _without_name(said: str, answer: str) -> Iterator[str]:
    yield said
    names = [_name_of(text) for text in (said, answer)]
    if names[0] and not names[1]:
        yield said.partition("=")[2].strip()
    if names[1] and not names[0]:  # x = is not part of an answer
        yield answer.partition("=")[0] + "=" + said


def _name_of(text: str) -> str:
    """What an equation says the value of: x, f(x), or (x, y)."""
    name, equals, _ = text.partition("=")
    name, letters = name.strip(), re.findall(r"\w", name)
    point = bool(re.fullmatch(r"\([a-z](?:, ?[a-z]){1,3}\)", name)) and letters == sorted(set(letters))
    return (
        name
        if equals and text.count("=") == 1 and (point or NAME.fullmatch(name)) and name.casefold() not in CHANGING
        else ""
    )


_MATHS = re.compile(r"[\d\\_^=+*/<>|π∞×·√{}]|(?<![^\W\d_])[^\W\d_](?![^\W\d_])")
_TIGHT = (
    (re.compile(r" ?([(){}\[\],;:=+*/^|<>×·-]) ?"), r"\1"),
    (re.compile(r"\\([{}])"), r"\1"),
    (re.compile(r"([\^_]) ?(\w)"), r"\1{\2}"),  # TeX takes one
    (
        re.compile(
            r"(?<![\w})^_/\\])\\frac\{(\\?\w{1,20}|\w{0,9}\\sqrt\{\w{1,9}\})\}\{(\d{1,20}|[^\W\d_]|\\[a-zA-Z]{1,20})\}(?![\w{(\\^_/!'])"
        ),
        r"\1/\2",
    ),
)
_STEM = re.compile(r"(.*[})\dπ]) ([a-zA-Z][a-zA-Z ./^²³]{1,59})", re.DOTALL)


def _same_text(said: str, answer: str) -> bool:
    """The same but for spaces, where a unit may stand behind one of two expressions."""
    if _tight(said) == _tight(answer):
        return True
    mine, right = _split_unit(said), _split_unit(answer)
    if (mine[1] is None and right[1] is None) or not _MATHS.search(answer):
        return False
    return (_tight(mine[0]) == _tight(right[0]) and None in (mine[1], right[1])) or (
        mine[1] == right[1] and _tight(mine[0]) == _tight(right[0])
    )


def _split_unit(text: str) -> tuple[str, object]:
    found = _STEM.fullmatch(text) if len(text) <= LONGEST else None
    unit = unit_of(TAIL.sub("", found[2])) if found else None
    return (found[1], unit) if found and unit else (text, None)


def _tight(text: str) -> str:
    """Words in small letters; in formulas the case counts, and spaces do not unless they keep apart what would be one."""
    if not _MATHS.search(text) and re.search(r"[^\W\d_]{3}", text):
        return _TIGHT[0][0].sub(r"\1", text).casefold()
    for pattern, instead in _TIGHT:
        text = pattern.sub(instead, text)
    return re.sub(r"(?<![^\W\d_]) (?=[^\W\d_])|(?<=[^\W\d_]) (?![^\W\d_])|(?<!\w) | (?!\w)", "", text)


def _same_members(said: str, answer: str, depth: int) -> bool:
    """Tuples and intervals member by member; sets, and lists without brackets, in any order."""
    right = _members(answer)
    mine = _members(said) if right else None
    if mine is None or right is None or mine[0] != right[0] or len(mine[1]) != len(right[1]) or depth > DEEPEST:
        return False
    names = [{member.partition("=")[0] for member in members if "=" in member} for members in (mine[1], right[1])]
    # y=1, x=2 in another order says another thing than 2, 1
    ordered = right[0] not in ("", "{}") or (names[0] != names[1] and max(map(len, names)) > 1)
    left = list(mine[1])
    for i, member in enumerate(right[1]):
        places = [i - len(right[1]) + len(left)] if ordered else range(len(left))
        found = next((at for at in places if _same_member(left[at], member, depth)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_member(said: str, answer: str, depth: int) -> bool:
    right, mine = quantity(answer), quantity(said)
    if right is not None or mine is not None:
        return right is not None and mine is not None and same_quantity(mine, right)
    return _same_members(said, answer, depth + 1) or any(_same_text(text, answer) for text in _without_name(said, answer))


def _members(text: str) -> tuple[str, list[str]] | None:
    """The brackets of a list, "" for none, and its members."""
    text = re.sub(r"\\([{}])", r"\1", text)
    if len(text) > LONGEST:
        return None
    pieces, bounds = _split(text), ""
    if len(pieces) == 1 and text[:1] in tuple("([{"):
        bounds, pieces = text[0] + text[-1], _split(text[1:-1])
    if bounds not in ("", "()", "[]", "{}", "(]", "[)") or not 2 <= len(pieces) <= MOST or "" in pieces:
        return None
    return bounds, pieces


def _split(text: str) -> list[str]:
    """At commas, semicolons and "and" outside of brackets; one piece where brackets do not close."""
    pieces, depth, begun = [], 0, 0
    for found in re.finditer(r"[()\[\]{}]|, and |[,;]| and ", text):
        if found[0] in "([{":
            depth += 1
        elif found[0] in ")]}":
            depth -= 1
            if depth < 0:
                return [text]
        elif depth == 0:
            pieces.append(text[begun : found.start()].strip())
            begun = found.end()
    return [text] if depth else [*pieces, text[begun:].strip()]
