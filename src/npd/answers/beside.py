"""What stands before and behind an answer: does it lead to it, is it part of it, does it deny it or take it back?

What is not known to say nothing is read together with the answer, so that no grammar of an answer fits the whole
(`sameness`). Only text near an answer is read, within bounds.
"""

from __future__ import annotations

import re

from npd.answers.quantities import DENYING, plain_word, word_set

__all__ = ["NEAR", "SIGNS", "by_itself", "is_denied", "is_over", "takes_back"]

NEAR = 300  # characters before and behind an answer that are read


def _any(text: str) -> str:
    """A pattern of any of these, which are apart by bars and may stand on several lines."""
    return "(?:" + "|".join(line.strip().strip("|") for line in text.splitlines() if line.strip()) + r")(?!\w)"


SIGNS = word_set(r"- − + * / ^ < > ≠ ≤ ≥ ± × · √ = ~ \times \cdot \div \neq \pm")

# -- behind

# What closes a formula, a line of one, or emphasis: it says nothing.
_CLOSERS = re.compile(
    r"(?:[ \t$*_\"”)}∎✓✔✅|]|\\[)\],;:!]|\\\\|\\(?:right|q?quad|blacksquare|square|qed)(?![a-zA-Z])|\\end\{\w{1,20}\*?\}"
    r"|\\tag\*?\{\w{1,9}\}|</?\w{1,20}>)*"
)
_WRONG = _any(
    """
    wrong|incorrect|not (?:right|correct|the)|false|impossible|extraneous|rejected|invalid|untrue|a mistake|ruled out|
    discarded|eliminated
    """
)
_TURNING = _any(
    """
    no|nope|not|wait|actually|hmm{1,9}|sorry|oops|scratch that|correction|rather|or|instead|but|however|plus|minus|times|
    divided|multiplied|maybe|perhaps|alternatively
    """
)
_RETRACTING = _any(
    r"""
    isn.?t|wasn.?t|mistaken?|rule out|discard|reject|(?:can|could)(?: ?not|n['’]t|['’]t) be (?:right|correct|true|the)|
    (?:does|do|did)(?: not|n['’]t) (?:satisfy|work|hold|fit|count|meet|make sense|solve|check)|on second thoughts?|
    apologi[sz]e|(?:take|retract|scratch) (?:that|it|this)|(?:an?|my) (?:\w{1,12} )?error|
    let me (?:correct|fix|redo|recheck|recompute)|(?:correct|right|actual) (?:value|one|result) (?:is|should|would)|
    no solutions?
    """
)
_TAKEN_BACK = re.compile(
    rf"(?:(?:^|[.!?…\n,;:(–—])[\s*_]{{0,9}}|\sbut\s){_TURNING}"
    rf"|(?:(?<!\w)(?:is|was|looks|seems|be)|['’]s)(?: \w{{1,12}})? {_WRONG}"
    rf"|(?:^|[,;:(])[\s*_]{{0,9}}(?:which is )?{_WRONG}"
    rf"|(?<!\w){_RETRACTING}",
    re.IGNORECASE,
)
_CONNECTING = re.compile(
    _any(
        "because|since|as|where|when|whenever|which|so|with|for|given|thus|hence|therefore|using|by|after|if and only|"
        "achieved|attained|obtained|reached|occurring"
    ),
    re.IGNORECASE,
)
_COUNTS = word_set("zero one two three four five six seven eight nine ten eleven twelve hundred thousand million half")
_GOES_ON = re.compile(r"\s*(?:[+*/^×·÷=≠!]\s?[\d\\(]|\\(?:times|cdot|div|pm|neq?|sqrt)(?![a-zA-Z])|[/^×·÷])")


def _closers(line: str) -> str:
    found = _CLOSERS.match(line)
    return found[0] if found else ""


def takes_back(after: str) -> bool:
    """Do words behind an answer take it back: wait, it is wrong, or 6?"""
    return _TAKEN_BACK.search(after[:NEAR]) is not None


def is_over(after: str) -> bool:
    """Does nothing that stands behind an answer belong to it, or take it back?"""
    after = after[:NEAR]
    if takes_back(after):
        return False
    line, _, later = after.partition("\n")
    rest = line[len(_closers(line)) :]
    if rest in ("", ",", ";"):
        return not (re.match(r"\s*[\d$\\(]", later) if rest else _GOES_ON.match(later))
    if re.match(r"[.。](?![\d.])|(?:\\approx|≈) ?\$?[\d.]+\$?\.?\s*$", rest):
        return True
    clause = re.split(r"[.。](?!\d)", rest, maxsplit=1)[0]
    if first := re.match(r"(?:[,;:(，；：]|\s?[–—](?=\s))[\s*_\"“(]{0,9}", clause):
        word = re.match(r"[^\W\d_]{2,}", clause[first.end() :])
        if word is None or word[0].casefold() in DENYING | _COUNTS or "\\boxed" in clause:
            return False
        return bool(_CONNECTING.match(word[0])) or not re.search(r"\d|\\[a-zA-Z]|answer", clause)
    return (rest != line or line[0].isspace()) and _CONNECTING.match(rest) is not None


# -- before

_DENIAL = re.compile(
    r"(?<!\w)"
    + _any(
        r"""
        not|never|cannot|neither|nor|no|none|nobody|nothing|wrong|wrongly|incorrect|incorrectly|mistakenly|false|falsely|
        unlikely|doubt|impossible|anything but|exclud(?:e|es|ed|ing)|rul(?:e|es|ed|ing) out|reject(?:s|ed|ing)?|
        \w{1,9}n['’]t|isnt|arent|wasnt|cant|dont|doesnt|wont|nicht|keine?|pas|jamais|nunca|não|nao|non|moins|menos|не|нет|минус
        """
    ),
    re.IGNORECASE,
)
_DENIAL_OF_OTHERS = re.compile(r"[不非負负没沒未无無減减]|至少|至多|大于|大於|小于|小於|超过|超過|マイナス|より")
# It is of what is counted, not of the count: the students who do not play are 5.
_RELATIVE = re.compile(
    r"(?<!\w)(?:that|which|who) (?:(?:are|is|do|does|did|can|have|has|were|was|will)(?: not|n['’]t)|cannot|can['’]t)(?!\w)"
    r"(?=.*(?<!\w)(?:is|are|was|were|equals?)(?!\w)|.*=)",
    re.IGNORECASE,
)


def is_denied(before: str) -> bool:
    """Do words in the clause before an answer deny it?"""
    clause = re.split(r"[.,;!?。，；！？](?!\d)", before[-NEAR:])[-1]
    return bool(_DENIAL.search(_RELATIVE.sub(" ", clause)) or _DENIAL_OF_OTHERS.search(clause))


# What opens a formula, a line of one, or emphasis: it says nothing.
_OPENERS = re.compile(
    r"(?:[\s$*_\"“&{∴✅✓|]|(?<!\w)\(|\\[(\[,;:!]|\\\\|\\(?:left|q?quad|displaystyle|bf|[lL]arge|LARGE|[hH]uge|therefore)"
    r"(?![a-zA-Z])|\\(?:text|math)[a-z]{0,4}\{|\\begin\{\w{1,20}\*?\}|<\w{1,9}>)+$"
)
_OF = re.compile(
    r"(?<!\w)(?:total|value|answer|result|number|amount|sum|length|width|height|depth|area|perimeter|circumference|volume|"
    r"probability|chance|maximum|minimum|remainder|profit|loss|radius|diameter|cost|price|weight|mass|distance|speed|"
    r"rate|average|mean|median|mode|age|time|score|measure|count|quotient|product|difference|balance|salary|"
    r"slope|size|capacity) of$",
    re.IGNORECASE,
)
_TO = re.compile(
    r"(?<!\w)(?:equal|come|add|reduce|simplify|evaluate|lead|amount|correspond|[a-z]{3,20}(?:s|ed|ing)) to$", re.I
)
_LEADS = re.compile(
    r"(?:^|(?<![!<>≠≤≥~±?])=|[⇒→≈]|\\(?:implies|Rightarrow|rightarrow|to|therefore|approx)|(?<![\d}\s])\s?[:：]"
    r"|(?:step|part|question|problem|case|example|exercise|solution|answer) \d{1,3}:|[^\W\d_][.!?)]|[.!?]\s+"
    r"|[^\W\d_]{2}[,;]|(?P<word>(?<!\\)(?<![^\W\d_])[^\W\d_]{2,}))$",
    re.IGNORECASE,
)
_VERBS = re.compile(
    r"(?<!\w)"
    + _any(
        """
        is|are|was|were|be|equals?|equal to|gets?|got|gives?|gave|obtains?|finds?|found|have|has|had|leaves?|left|yields?|
        makes?|takes?|needs?|costs?|total of|to|becomes?|remains?
        """
    )
    + "|=",
    re.IGNORECASE,
)
_COMPUTING = word_set(
    """
    minus negative plus times twice half double triple reciprocal inverse opposite square squared cube cubed root roots sqrt
    log factorial modulo mod than least most above below under over between up close past exceeds exceeding exceed beyond
    beneath near nearly almost except without unless absolute both either neither
    """
)


def _leads(before: str) -> bool:
    """Does what stands before a box lead to it: words, an equals sign, nothing?"""
    above, _, line = before.rpartition("\n")
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{1,20}$", line):
        return False  # un\boxed{true}
    line = re.sub(r"\\(?:text|textbf|textrm|mathrm|mathbf)\s?\{([^{}]{0,200})\}", r"\1 ", line)
    line = re.sub(r"^(?:\s{0,9}>)*\s{0,9}(?:#{1,6}\s)?", "", line)
    if is_denied(line):
        return False
    bare = _OPENERS.sub("", re.sub(r"(?: (?:the|a|an|be|exactly|approximately))+$", "", _OPENERS.sub("", line)))
    if not bare:
        last = (above.split() or [""])[-1].strip("$").casefold()
        return last not in (_COMPUTING | SIGNS | {"not", "or"}) - {"="}
    found = _LEADS.search(bare if bare[-1:] not in (".", "!", "?") else line[: len(bare) + 1])
    if found is None or (bare[-1:] in (",", ";") and line.count("(") > line.count(")")):
        return False
    if re.search(r"\\boxed[^.!?:;\n]*$", line) and not re.search(r"(?:or rather|no,|wait,|actually,?) *$", bare):
        return False  # one of several
    clause = _VERBS.split(re.split(r"[.,;!?](?!\d)", bare)[-1])[-1]
    if not _COMPUTING.isdisjoint(re.findall(r"[^\W\d_]+", clause.casefold())):
        return False
    word = (found["word"] or "").casefold()
    pattern = {"of": _OF, "to": _TO}.get(word)
    return pattern.search(bare) is not None if pattern else word not in DENYING


def by_itself(before: str, box: str, after: str) -> str:
    """What is in a box; or, where that is part of something, what it is part of: for the box is no answer then."""
    opened, closed, back = _leads(before), is_over(after), takes_back(after)
    if opened and closed:
        return box
    lines, rest = [line.strip() for line in before.split("\n")], after.partition("\n")[0]
    line = lines[-1] if lines[-1].strip(" $") else " ".join(lines[-3:])
    if opened and not back and (counted := _counted(rest)):
        return f"{box} {counted}"
    closers = _closers(rest)
    words = rest[len(closers) :].replace("$", "").removeprefix("such ")
    if opened and not back and closers[-1:].isspace() and re.match(r"[^\W\d_]{2}", words):
        return f"{box} " + re.split(r"[.](?:\s|$)", words, maxsplit=1)[0]
    glued = bool(not opened and re.search(r"\w$|[\d.,})]\s?$", line)) or bool(re.match(r"\w|[.,]\d", rest))
    if not re.fullmatch(r"[\d.,]+" if rest[:1] in ("^", "!") else r"-?[\d.,]+", box):
        glued = glued or not (opened and rest[:1].isspace())
    whole = back or not rest.strip(" $")
    behind = "" if closed else after if whole else re.split(r"[.]\s", rest, maxsplit=1)[0]
    return re.sub(r"(?<!\\)\$|\\[()\[\]]", "", ("" if opened else line) + ("{" + box + "}" if glued else box) + behind)


def _counted(rest: str) -> str:
    """What a box counts, where the words behind it only say of what, for what or where: 5 children at the party."""
    found = re.match(
        r"\$? ?((?:[a-z]{3,20} ){1,4}?)(?:to|at|in|on|for|during|who|that|which)(?!\w)[^\d\\.]{0,200}(?:\.\s|\.?\$?$)", rest
    )
    nouns = [word for word in found[1].split() if word not in _KINDS] if found else []
    return " ".join(nouns) if nouns and all(map(plain_word, nouns)) else ""


_KINDS = frozenset(["such", "positive", "distinct", "different", "possible", "real", "integer"])
