"""Where a response says its final answer, and whether what stands beside it takes it back.

In <answer> tags, in \\boxed{}, behind # or "answer:"; else in its last line. What a model thought before its answer is no
answer. All of it takes time linear in the text's length, for responses are untrusted: whatever may repeat in front of what
can fail has a bound.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator

from npd.answers.beside import NEAR, SIGNS, by_itself, is_denied, is_over, takes_back
from npd.answers.quantities import DENYING, word_set

__all__ = ["OPEN", "extract_answer", "final_answer", "is_marked", "marked_answer", "without_thoughts"]

OPEN = "<answer>"
_TAGS = re.compile(r"<(/?)answer>", re.IGNORECASE)
_THOUGHT = re.compile(r"</(?:think|thinking|thought)>|\[/THINK\]|<\|channel\|>final<\|message\|>")
_THINKING = re.compile(r"<(?:think|thinking|thought)>|\[THINK\]")
_SPECIAL = re.compile(r"(?:\s{0,9}(?:<\|\w{1,30}\|>|</s>|<eos>|<end_of_turn>)){1,9}$")


def extract_answer(text: str) -> str:
    """The final answer of a response; where what stands beside it is part of it (-\\boxed{5}, not 5), with that."""
    return final_answer(text)[0]


def marked_answer(text: str) -> str | None:
    """The answer that a response marks; None where it marks none."""
    said, marked = final_answer(text)
    return said if marked else None


def final_answer(text: str) -> tuple[str, bool]:
    """As `extract_answer`, and is it marked, rather than the last line?"""
    text = without_thoughts(text)
    said = _in_tags(text)
    said = _within(text) if said is None else said
    return (_last_line(text), False) if said is None else (said, True)


def is_marked(text: str) -> bool:
    """Does a response mark its final answer, rather than end with it?"""
    return bool(marked_answer(text))


def without_thoughts(text: str) -> str:
    """What stands behind a model's thoughts, nothing where they have no end; and without special tokens at its end."""
    text = text[max((found.end() for found in _THOUGHT.finditer(text)), default=0) :]
    begun = _THINKING.search(text)
    text = (text[: begun.start()] if begun else text).rstrip()
    return text[:-NEAR] + _SPECIAL.sub("", text[-NEAR:])


def _within(text: str) -> str | None:
    """An answer that is marked without tags."""
    box, behind = _in_box(text), _behind_answer(text)
    if box is not None and not (behind and behind[0] > box[0] and _NAMED.match(behind[1])):
        return box[1]
    said = _behind_hash(text, behind is not None) if box is None else None
    return said if said is not None else behind[1] if behind else None


# An answer that is no remark on one: who names another one behind a box means that one.
_NAMED = re.compile(
    r"[\s$*\\(]{0,9}(?:[-+−]?[\d.]|\\?(?:d?frac|sqrt|text|pi|left)(?![a-z])|[A-J](?![\w'’]| [a-z])|[a-z] ?=|"
    r"(?:yes|no|true|false)(?!\w)|(?:zero|one|two|three|four|five|six|seven|eight|nine|ten)[.!\s*$]*$)",
    re.IGNORECASE,
)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    before = lines[-2].split()[-1].casefold() if len(lines) > 1 else ""
    return f"{lines[-2]} {lines[-1]}" if before in DENYING or before in SIGNS else lines[-1]


def _last(found: Iterable[re.Match[str]]) -> re.Match[str] | None:
    last = deque(found, maxlen=1)
    return last[0] if last else None


def _line_before(text: str, at: int) -> str:
    return text[max(0, at - NEAR) : at].rpartition("\n")[2]


# -- tags and hashes


def _in_tags(text: str) -> str | None:
    """What stands in the last pair of <answer> tags, or behind the last one that was not closed though another was."""
    found: tuple[int, int, int, int] | None = None
    opened: re.Match[str] | None = None
    for tag in _TAGS.finditer(text):
        if not tag[1]:
            opened = tag
        elif opened is not None:
            found, opened = (opened.end(), tag.start(), opened.start(), tag.end()), None
    if found is None:
        return None
    if opened is not None:
        return text[opened.end() :].strip()
    start, end, begun, over = found
    said = text[start:end].strip()
    before, after = _line_before(text, begun), text[over : over + NEAR]
    clause = re.split(r":|</answer>", before, flags=re.IGNORECASE)[-1]
    changed = _CHANGED.search(before) or is_denied(clause) or (clause != before and re.fullmatch(r"\s*(?:or|and)\s", clause))
    if changed or takes_back(after) or re.match(r"[.,]?\d|\s?(?:[/^×·÷!]|[-+] \d|(?:k|million|is not)(?!\w))", after):
        return f"{before}{{{said}}} {after}"
    inner = _in_box(said)
    if inner is None and "\n" not in said:
        inner = _behind_answer(said) if "####" not in said else (0, said.rpartition("####")[2].strip())
    return inner[1] if inner else said


_CHANGED = re.compile(r"(?:[-−+/^√]|[≠≤≥±<>]\s?|(?<!\w)(?:not|never|minus|n['’]t)\s)$", re.IGNORECASE)
# GSM8K's mark and the demo's, but no Markdown heading.
_HASH = re.compile(r"(?:#{4}\s{0,99}|(?<![^\W\d])(?<![/#])#(?=[^\s#!]))([^\n#]+)")
_NUMBERED = re.compile(
    r"(?<!\w)(?:issue|ticket|problem|question|step|number|item|case|no\.|page|room|or|and|,)\s$", re.IGNORECASE
)


def _behind_hash(text: str, otherwise: bool) -> str | None:
    """What stands behind the last mark; no hashtag where something else marks the answer."""
    found = _last(_HASH.finditer(text))
    if found is None or not found[1].strip():
        return None
    before = _line_before(text, found.start())
    if otherwise and re.fullmatch(r"#[^\W\d]\w{0,40}\s*", found[0]):
        return None
    after = text[found.end() : found.end() + NEAR]
    if _NUMBERED.search(before) or _CHANGED.search(before) or is_denied(before) or takes_back(after):
        return before + found[0] + after
    said = _emphasised(found[1])
    return said if (box := _in_box(said)) is None else box[1]


def _emphasised(said: str) -> str:
    """Without the end of an emphasis that began before the mark."""
    said = said.strip()
    bare = said.rstrip("* ")
    return said if "*" in bare else bare


# -- boxes

_BRACE = re.compile(r"\\(?:boxed|fbox) ?(?:(?=([^\s{}\\]|\\[a-zA-Z]{1,20}))|\{)|\\[{}]|[{}]")
_Box = tuple[int, int, int, int]
"""Where a box begins, where what is in it begins and ends, and where the box ends."""


def _boxes(text: str) -> Iterator[_Box]:
    """Boxes in the order in which they close; braces within one are its own."""
    opened: list[tuple[int, int]] = []  # where a box and what is in it begin; 0: another brace
    for brace in _BRACE.finditer(text):
        if brace[1]:
            yield (brace.start(), brace.end(), brace.end(1), brace.end(1))
        elif brace[0] == "}":
            begun, start = opened.pop() if opened else (0, 0)
            if start:
                yield (begun, start, brace.start(), brace.end())
        elif brace[0][-1] == "{" and brace[0] != "\\{":
            opened.append((brace.start(), brace.end() if len(brace[0]) > 1 else 0))


_BETWEEN = re.compile(
    r"[\s$]{0,3}(?:,|;|,? ?(?:and|or)(?!\w)|\\text\{ ?,? ?(?:and|or) ?\})[\s$]{0,3}(?:\\?[a-z](?:_\w)? ?= ?)?\$?"
)
MOST = 32  # boxes that are read as a list


def _in_box(text: str) -> tuple[int, str] | None:
    """Where the last box begins, and the answer in it, or in it and those before it that make a list with it."""
    boxes = deque(_boxes(text), maxlen=MOST)
    if not boxes:
        return None
    listed = [boxes.pop()]
    while boxes and _BETWEEN.fullmatch(text[boxes[-1][3] : listed[0][0]]):
        listed.insert(0, boxes.pop())
    begun, over = listed[0][0], listed[-1][3]
    before, after = text[:begun][-NEAR:], text[over : over + NEAR]
    said = ", ".join(text[start:end].strip() for _, start, end, _ in listed)
    if not said:
        return None
    if len(listed) > 1 and before[-1:] in ("(", "[", "{") and after[:1] in (")", "]", "}"):
        said, before, after = before[-1] + said + after[0], before[:-1], after[1:]
    return begun, by_itself(before, said, after)


# -- "answer:"

_ANSWER = re.compile(r"(?<![</\w\\])answers?(?!\w)", re.IGNORECASE)
_SAYS = re.compile(
    r"[*_]{0,3}(?:\s(?:to|for|of) (?:the|this|your|that|our) [a-z ]{1,40}?)?[,*_]{0,3}\s?"
    r"(?:therefore |thus |then |simply |just |here )?"
    r"(?:(?:is|are|would be|should be|must be|will be|comes out to be|was)"
    r"(?: (?:equal to|found to be|therefore|thus|simply|just))?(?!\w)|[:=])\s{0,9}[:=,]?",
    re.IGNORECASE,
)
_DETERMINERS = re.compile(
    r"(?<!\w)(?:(?:so|thus|and|the|an?|this|that|my|our|your|his|her|its|final|correct|right|exact|numerical|simplified|"
    r"desired|required|actual|complete|full|short|best|only|possible)[\s*_]{1,3})+$",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    r"(?<!\w)(?:this|that|your|any|each|another|which|every|whose|possible)\s(?:\w{1,20}\s){0,2}$", re.IGNORECASE
)
_HYPOTHETICAL = word_set(
    """
    if suppose assume assuming whether say unless let imagine should would might could twice thrice half double square cube
    root opposite inverse reciprocal times minus plus
    """
)
_REMARK = re.compile(
    r"[\s*]{0,9}(?:(?:also|now|indeed|therefore|then|quite) )?(?:correct|right|reasonable|rounded|valid|consistent|confirmed|"
    r"verified|below|above|given|shown|as follows|found|obtained|expressed|written|in|not needed|unique|clear|"
    r"complete)(?!\w)",
    re.IGNORECASE,
)
_BLOCKS = {"\\[": "\\]", "$$": "$$", "```": "```", "\\(": "\\)"}


def _behind_answer(text: str) -> tuple[int, str] | None:
    """Where the last "answer" that says one stands, and what it says; its whole line, where that is not the answer."""
    chosen = last = None
    for found in _ANSWER.finditer(text):
        last = found
        says = _SAYS.match(text, found.end(), found.end() + 99)
        if says is None or says.end() == found.end():
            continue
        passing = _REMARK.match(text, says.end(), says.end() + 40) or _OTHERS.search(
            text[max(0, found.start() - 60) : found.start()]
        )
        if chosen is None or not passing:
            chosen = (found, says.end())
    if chosen is None:
        return last and _turned(text, last)
    return (chosen[0].start(), said) if (said := _said(text, *chosen)) else _turned(text, chosen[0])


def _said(text: str, found: re.Match[str], start: int) -> str:
    """What stands behind "the answer is", up to the end of the line, of what is bold there, of a block or of the sentence.

    With what stands before it, where that makes it another thing than the answer.
    """
    line = _line_before(text, found.start())
    named = _DETERMINERS.search(line)
    lead = line[: named.start()] if named else line
    begun = len(text) - len(text[start:].lstrip())
    end = text.find("\n", begun)
    end = len(text) if end < 0 else end
    said, after = text[begun:end].strip(), text[end : end + NEAR]
    clause = re.split(r"[.,:;!?](?!\d)", lead)[-1]
    changed = is_denied(clause) or not _HYPOTHETICAL.isdisjoint(re.findall(r"[^\W\d_]+", clause.casefold()))
    changed = (
        changed or re.search(r"[-−^/+√]$|\S\s?[-−+/×·]\s$|\w\s?\*\s?$|(?<!\w)(?:of|or|than|to|by|from)\s$", lead) is not None
    )
    if changed or (not named and lead.rstrip()[-1:].isalnum()):
        return f"{line}{found[0]} {said}"
    opener = re.fullmatch(r"[*_]{0,3}(```|\\\[|\$\$|\\\()\w{0,9}[*_]{0,3}", said)
    if opener:
        block, closed, behind = text[end : end + 2 * NEAR].partition(_BLOCKS[opener[1]])
        said, after = (block.strip(), behind) if closed else (said, after)
    said = re.sub(r"^[*_]{1,3}\s", "", said)
    if line.count("**") % 2 or re.match(r"\*\*(?!\*)", said):
        bold, closed, behind = said.removeprefix("**").partition("**")
        if closed and bold.strip():
            return bold.strip() if is_over(behind + after) else said.replace("**", "")
    said = _first_sentence(said)
    if said.endswith(")") and said.count(")") > said.count("(") and line.count("(") > line.count(")"):
        said = said[:-1]
    return f"{{{said}}} {after.strip()}" if takes_back(after) else _emphasised(said)


def _first_sentence(said: str) -> str:
    """Without sentences that say other things behind it."""
    stop = re.search(r"(?:(?<=[\d)}$*])|(?<=[^\W\d_]{5}))[.!?](?:\$|\*\*)?\s{1,9}(?=[A-Z])", said[:NEAR])
    return said if stop is None or takes_back(said[stop.start() :]) else said[: stop.end()].strip()


def _turned(text: str, found: re.Match[str]) -> tuple[int, str] | None:
    """5 is the answer."""
    line = _line_before(text, found.start())
    named = _DETERMINERS.search(line)
    turned = re.search(r"(?:^|[.!?;:])([^.!?;:]{1,150}) (?:is|are) $", line[: named.start()] if named else "")
    after = text[found.end() : found.end() + NEAR]
    if turned is None or is_denied(turned[1]) or takes_back(after) or re.match(r"\s?\w", after):
        return None
    said = re.sub(r"^\s*(?:(?:so|thus|hence|therefore|then|and|finally),? )+", "", turned[1], flags=re.IGNORECASE)
    return found.start(), said.strip()
