"""Do two short texts say the same answer? Quantities by value, lists by their members, choices by their letter, else as text.

A wrong answer that is called right teaches the wrong thing, a right one that is called wrong costs a sample. So what was said
is read whole, by a small grammar (`quantities`, and the forms below), or compared as text; what can be read in two ways is
called wrong. All of it takes time linear in the texts' length: they are untrusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from npd.answers.choices import bare_letter, lettered, same_choice, same_verdict, speaks_against, words_of
from npd.answers.formulas import in_words, opener, tight
from npd.answers.quantities import (
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
    word_set,
)
from npd.answers.writings import plain

__all__ = ["plain", "same_answer"]


def same_answer(said: str, answer: str, marked: bool = True) -> bool:
    """Is what was said the right answer?

    Quantities are equal by value: 1/2, \\frac{1}{2}, ½ and 0.5; 10,000, 10 000 and 10'000; 3 \\times 10^5. Units and nouns
    count where both sides have them. 50% is 50, as in MATH's own normalisation, and 0.5 too, as in math-verify. Before a
    quantity may stand words that only lead to it ("so the total is"), or an equation that ends with it.

    Args:
        marked: was what was said marked as the answer? Of a line of prose the last sentence is read.
    """
    answer = plain(answer)
    if not answer:
        return False
    said, most = " ".join(said.split()), 4 * len(answer) + MUCH
    if marked and len(said) > most:
        return False
    said = plain(said[-most:])
    if said == answer:
        return True
    if said[:1] == "{" and answer[0] != "{" and answer[:2] != "\\{" and _is_group(said):
        said = plain(said[1:-1])
    if not marked and (last := _last_sentence(said[-LONGEST:])) != said:
        return _reads_as(said, answer) or (len(last) < LONGEST and _reads_as(last, answer))
    return _reads_as(said, answer)


def _is_group(text: str) -> bool:
    """Braces of TeX's that say nothing, and are no set."""
    return len(text) <= LONGEST and not re.search("[,;]", text) and opener(text, len(text)) == 0


def _reads_as(said: str, answer: str) -> bool:
    right = quantity(answer)
    if right is not None:
        mine = _said_quantity(said)
        return mine is not None and same_quantity(mine, right)
    return _same_form(said, answer)


LONGEST = 1000  # characters that are read as a sentence, or as members; longer ones are compared as text
MUCH = 4000  # characters more than four for each of the answer's: what is longer is another answer


# -- sentences that end with a quantity

_STOP = re.compile(r"(?<=[.!?:]) (?=\S)")
_SHORT = word_set(  # for what is written with a full stop
    """
    approx ca max min vs no nos nr fig figs eq eqs eg ie etc cf resp incl excl est avg ch sec vol pp dr mr mrs ms st
    jr sr prof rev gen gov sen rep lt col sgt capt mt ft al inc ltd co corp dept univ jan feb mar apr jun jul aug sep
    sept oct nov dec
    """
)
# Words that do not change what follows in another sentence, or behind a colon.
_HARMLESS = word_set(
    """
    a an any as at after all the that there their this then therefore so now since its is in into for of on to
    together was way were what when where which while who whether each every how here right correct true yes final
    first second third last next total with sum product many much such still can could will would may
    """
)
_UNSAFE = (CHANGING - _HARMLESS) | DENYING
_UNSAFE |= word_set(
    """
    ca circa vs cf est untrue add adding subtract subtracting multiply multiplying divide dividing increase decrease
    raise error margin tolerance deviation remove discount index step page chapter section figure problem question
    exercise part item line note example number numbered
    """
)


def _last_sentence(text: str) -> str:
    begun = 0
    for found in _STOP.finditer(text):
        if _ends(text[begun : found.start()], text[found.end()]):
            begun = found.end()
    return text[begun:]


def _ends(before: str, after: str) -> bool:
    """Does a sentence end here, which does not change what comes after it?"""
    *_, word = re.split(r"[\s(\"']", before[:-1].rstrip(")\"'")) or [""]
    if word.casefold() in _SHORT or (len(word) < 2 and not word.isdigit()) or "." in word[:-2]:
        return False
    if before[-1] != ":" and (after.isupper() or (after.isalpha() and not after.islower())):
        return True
    words = words_of(before)
    spelled = re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[\s,'\"()*-])*[?:!]", before)
    return spelled is not None and words.isdisjoint(_UNSAFE) and not any(w.endswith("n't") for w in words)


_SUBJECTS = (
    "answer|result|total|sum|value|number|amount|product|difference|quotient|remainder|solution|area|perimeter|volume|length|"
    "width|height|distance|time|age|speed|probability|average|mean|median|count|cost|price|profit|change|rate|weight|"
    r"(?:gcd|gcf|hcf|lcm|(?:greatest|highest|least|lowest) common (?:divisor|factor|multiple|denominator))(?: \([a-z]{3}\))?"
)
_VERBS = (
    "is|are|was|were|has|have|had|gets?|got|obtains?|finds?|found|needs?|needed|makes?|made|gives?|gave|equals?|"
    "takes?|took|earns?|earned|pays?|paid|costs?|spends?|spent|saves?|saved|sells?|sold|buys?|bought|eats?|ate|uses?|used|"
    "weighs?|weighed|receive[sd]?|walks?|walked|runs?|ran|reads?|drinks?|drank|drives?|drove|collects?|collected|bakes?|baked"
)
_DO = "have|need|make|pay|earn|get|take|be|spend|save|cost|sell|use|eat|buy|read|walk|run|drive|collect|bake|drink|receive"
_NAMED = "|".join(sorted(CHANGING | {"it", "there", "here", "everyone", "someone", "everybody", "somebody"}))
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|finally|now|in total|altogether|overall|in all|in conclusion|final answer),? |"
    r"(?:the|a|our|my|this|that|it|there|which|we|i|he|she|they|you|final|correct|exact|whole|grand|"
    rf"(?:will|would|must) (?:{_DO})|(?:needs?|needed|has|have|had) to (?:{_DO})|equal to|{_VERBS}|"
    rf"(?!(?:{_NAMED})(?![a-z]))(?-i:[A-Z][a-z]{{1,15}})(?= (?:{_VERBS}|(?:will|would|must) (?:{_DO})) )|"
    r"simply|just|exactly|clearly|indeed|here|to (?:the|this|your) (?:problem|question|equation|puzzle|exercise)|"
    rf"comes to|adds up to|total of|therefore|{_SUBJECTS}):? |[:=] )+",
    re.IGNORECASE,
)
_OF = re.compile(
    r"(?<= )of ((?:(?:[a-z]{1,20}|\d{1,9}(?:\.\d{1,9})?),? ){1,8}?)(?=(?:is|are|was|were|equals|will be) )", re.IGNORECASE
)
_IS = re.compile(  # the other way around: 6 is the sum of 2 and 4
    rf"(.{{1,60}}?) (?:is|are|=) (?:the|our|my) (?:(?:final|correct|exact|whole) )?(?:{_SUBJECTS})"
    r"(?: of(?:,?(?: and)? \d{1,9}(?:\.\d{1,9})?){1,8})?",
    re.IGNORECASE,
)
_CALL = re.compile(  # gcd(12, 18)
    r"(?<![\w\\])\\?(?:gcd|gcf|hcf|lcm) ?\( ?\d{1,9}(?: ?, ?\d{1,9}){1,8} ?\)(?!\w)", re.IGNORECASE
)
_CONTRACTED = re.compile(rf"(?<!\w)(it|that|there|here|{_SUBJECTS})['’]s ", re.IGNORECASE)
_NO_PART_OF = DENYING | word_set("when whenever if where while unless given until as")
_EQUALS = re.compile(r" (?:equals|is equal to) ")
_BECAUSE = re.compile(r",? (?:because|since) ")
_ARITHMETIC = re.compile(r"(?:\d,\d{3}(?!\d)|[-+*/×·÷().\d\s{}^%$€£¥₹°]|\\(?:frac|sqrt|div)(?![a-zA-Z]))+")


def _said_quantity(said: str) -> Quantity | None:
    if len(said) > LONGEST:
        return None
    head, _, because = said.partition(found[0]) if (found := _BECAUSE.search(said)) else (said, "", "")
    head = _CONTRACTED.sub(r"\1 is ", _CALL.sub("the gcd", head))
    number = quantity(head) or _after_words(head) or _end_of_equation(head) or _before_words(head)
    return number if number is None or not found or _agrees(because, number) else None


def _after_words(said: str) -> Quantity | None:
    """Behind words that only lead to it, all of which are known."""
    said = _OF.sub(_without_of, said)
    lead = _LEAD.match(said)
    return None if lead is None else quantity(said[lead.end() :]) or _end_of_equation(said[lead.end() :])


def _before_words(said: str) -> Quantity | None:
    """In front of words that say what it is the value of."""
    found = _IS.fullmatch(said.rstrip("."))
    return None if found is None else quantity(found[1]) or _after_words(found[1])


def _without_of(found: re.Match[str]) -> str:
    """What "of 10 and 2" leaves: nothing, unless it may turn what the value is of into a condition, or into another value."""
    words = re.findall("[a-z]+", re.sub(r"(?<=\d),? and (?=\d)", " ", found[1]).casefold())
    return "" if _NO_PART_OF.isdisjoint(words) else found[0]


def _end_of_equation(said: str) -> Quantity | None:
    """x = 3 + 4 = 7, or 48 clips / 2 = 24 clips: what it is of is a name, or computed of numbers alone."""
    _, arrow, said = said.rpartition("⇒")
    first, *others = (part.strip() for part in _EQUALS.sub(" = ", said).split("="))
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


def _agrees(because: str, number: Quantity) -> bool:
    """Is it a reason of one clause whose last number, if it has any, is the same again?"""
    numbers = list(NUMBER.finditer(because))
    last = decimal(numbers[-1][0]) if numbers else number.value
    return not re.search(r"[.:;!?]", because) and not speaks_against(because) and last is not None and last == number.value


# -- other forms

MOST = 64  # members of a list that are compared one by one
DEEPEST = 4  # lists in each other


def _same_form(said: str, answer: str) -> bool:
    if (letter := bare_letter(answer)) is not None:
        return same_choice(said, letter) is not None
    if (verdict := same_verdict(said, answer)) is not None:
        return verdict
    if both := lettered(answer):
        more = same_choice(said, both[0])
        if (more is not None and said[0] in "(" + both[0]) or (more and _same_value(more, both[1])):
            return not more or _same_value(more, both[1])
        return _same_value(said, answer) or _same_value(said, both[1])
    return _same_value(said, answer)


def _same_value(said: str, answer: str, depth: int = 0) -> bool:
    """By value where one is a quantity, else a matrix or a list by its members, else as text."""
    right, mine = quantity(answer), quantity(said)
    if right is not None or mine is not None:
        return right is not None and mine is not None and same_quantity(mine, right)
    for compare in (_same_matrix, _same_members):
        if (same := compare(said, answer, depth)) is not None:
            return same
    said, answer = _of_elements(said, answer)
    return any(_same_text(text, answer) for text in _without_name(said, answer))


def _without_name(said: str, answer: str) -> Iterator[str]:
    yield said
    names = [_name_of(text) for text in (said, answer)]
    if names[0] and not names[1]:
        yield said.partition("=")[2].strip()
    if names[1] and not names[0]:  # x = is not part of an answer
        yield answer.partition("=")[0] + "=" + said


# x in an interval
_ELEMENT = re.compile(r"^[a-zA-Z] ?∈ ?(?=[(\[]|\\?\{|∅)")


def _of_elements(*texts: str) -> tuple[str, str]:
    """Two texts without an element of what they say, where one names it."""
    said, answer = (_ELEMENT.sub("", text, count=1) for text in texts)
    return (said, answer) if (said == texts[0]) != (answer == texts[1]) else (texts[0], texts[1])


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


_MATHS = re.compile(r"[\d\\_^=+*/<>|π∞×·√{}∈∪∩±]|(?<![^\W\d_])[^\W\d_](?![^\W\d_])")
_STEM = re.compile(r"(.*[})\dπ]) ([a-zA-Z][a-zA-Z ./^²³{}23-]{1,59})", re.DOTALL)


def _same_text(said: str, answer: str) -> bool:
    """The same but for spaces, where a unit may stand behind one of two expressions."""
    if tight(said) == tight(answer):
        return True
    if (words := in_words(answer)) is not None and words == in_words(said):
        return True
    mine, right = _split_unit(said), _split_unit(answer)
    if (mine[1] is None and right[1] is None) or not _MATHS.search(answer):
        return False
    return (tight(mine[0]) == tight(right[0]) and None in (mine[1], right[1])) or (
        mine[1] == right[1] and tight(mine[0]) == tight(right[0])
    )


def _split_unit(text: str) -> tuple[str, object]:
    found = _STEM.fullmatch(text) if len(text) <= LONGEST else None
    unit = unit_of(TAIL.sub("", found[2])) if found else None
    return (found[1], unit) if found and unit and in_words(found[1]) is None else (text, None)


def _same_members(said: str, answer: str, depth: int) -> bool | None:
    """Tuples and intervals member by member; sets, and lists without brackets, in any order. None where one is no list."""
    said, answer = _of_elements(said, answer)
    right = _members(answer)
    mine = _members(said) if right else None
    if mine is None or right is None:
        return None
    if mine.bounds != right.bounds or len(mine.members) != len(right.members) or mine.mixed != right.mixed:
        return False
    if mine.either != right.either and any(map(_BOUND.search, right.members)):
        return False
    names = [{member.partition("=")[0].strip() for member in both.members if "=" in member} for both in (mine, right)]
    # one or the other is two solutions of one unknown, or no decision
    if mine.either and (max(map(len, names)) > 1 or not (right.either or all(map(_MATHS.search, right.members)))):
        return False
    if mine.either != right.either and any(re.fullmatch(r"[(\[]?[A-J][)\]]?", member) for member in right.members):
        return False
    # y=1, x=2 in another order says another thing than 2, 1
    ordered = right.bounds not in ("", "{}") or (names[0] != names[1] and max(map(len, names)) > 1)
    left = list(mine.members)
    for i, member in enumerate(right.members):
        places = [i - len(right.members) + len(left)] if ordered else range(len(left))
        found_at = next((at for at in places if _same_member(left[at], member, depth + 1)), None)
        if found_at is None:
            return False
        del left[found_at]
    return True


def _same_member(said: str, answer: str, depth: int) -> bool:
    letters = [re.fullmatch(r"[(\[]([A-J])[)\]]\.?|([A-J])[).]{0,2}", text) for text in (said, answer)]
    if letters[0] and letters[1]:
        return (letters[0][1] or letters[0][2]) == (letters[1][1] or letters[1][2])
    return depth <= DEEPEST and _same_value(said, answer, depth)


class _List(NamedTuple):
    bounds: str
    """Its brackets, "" for none."""
    members: list[str]
    either: bool
    """Are its members joined by "or"?"""
    mixed: bool
    """Are they lists themselves, kept apart by semicolons?"""


def _members(text: str) -> _List | None:
    text = re.sub(r"\\([{}])", r"\1", text)
    if len(text) > LONGEST:
        return None
    (pieces, either), bounds = _split(text), ""
    if len(pieces) == 1 and text[:1] in tuple("([{"):
        bounds, (pieces, either) = text[0] + text[-1], _split(text[1:-1])
    if bounds not in ("", "()", "[]", "{}", "(]", "[)") or not 2 <= len(pieces) <= MOST or "" in pieces:
        return None
    inner = text[1:-1] if bounds else text
    mixed = ";" in inner and any(_COMMA.search(piece) for piece in inner.split(";")) and not re.search(r"[()\[\]{}]", inner)
    if mixed:
        pieces = [f"({piece.strip()})" for piece in inner.split(";")]
    return _List(bounds, pieces, either, mixed)


_BOUND = re.compile(r"[<>≤≥≠]")
_COMMA = re.compile(r",(?!\d{3}(?!\d))")


_JOINT = re.compile(r"[()\[\]{}]|(?P<or>(?:,| ) ?or )|, and |[,;]| and | & ")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def _split(text: str) -> tuple[list[str], bool]:
    """At commas, semicolons, "and" and "or" outside of brackets, and was there an "or"? One piece where they do not close.

    Where other members are kept apart by more than a comma, 1,234 is one of them.
    """
    apart = False
    for grouped in (False, True):
        pieces, depth, begun, either = list[str](), 0, 0, False
        for found in _JOINT.finditer(text):
            if found[0] in "([{":
                depth += 1
            elif found[0] in ")]}":
                depth -= 1
                if depth < 0:
                    return [text], False
            elif depth == 0 and not (grouped and _GROUPED.match(text, found.start())):
                pieces.append(text[begun : found.start()].strip())
                begun, either = found.end(), either or found["or"] is not None
                apart = apart or found[0] != "," or text[found.end() : found.end() + 1] == " "
        if not apart or not _GROUPED.search(text):
            break
    return ([text], False) if depth else ([*pieces, text[begun:].strip()], either)


_MATRIX = re.compile(r"\\begin ?\{([pb])matrix\}(.*)\\end ?\{\1matrix\}", re.DOTALL)


def _same_matrix(said: str, answer: str, depth: int) -> bool | None:
    """Matrices in round or square brackets, member by member. None where there is none; of others the text is compared."""
    if "&" in said + answer and ("matrix}" in answer or "\\\\" in answer) and not _MATRIX.fullmatch(answer):
        return tight(said) == tight(answer)
    found = _MATRIX.fullmatch(answer)
    mine = _MATRIX.fullmatch(said) if found else None
    if mine is None or found is None or len(said) > LONGEST:
        return None if found is None else False
    rows = [[row.split("&") for row in re.sub(r"\\\\ ?$", "", one[2].strip()).split("\\\\")] for one in (mine, found)]
    members = [[[cell.strip() for cell in row] for row in matrix] for matrix in rows]
    return list(map(len, members[0])) == list(map(len, members[1])) and all(
        _same_member(a, b, depth + 1) for row, other in zip(*members, strict=True) for a, b in zip(row, other, strict=True)
    )
