"""Short answers that are chosen: a letter, or yes and no. What stands behind one must not take it back.

What that is has no end, so what follows a letter must look like an option's text, or like a reason of known form.
"""

from __future__ import annotations

import re

from npd.answers.quantities import DENYING, word_set

__all__ = ["LETTERED", "bare_letter", "lettered", "same_choice", "same_letter", "same_verdict", "speaks_against", "words_of"]

_TURNING = DENYING | word_set("but wait actually instead rather however although though if else yes answer")
# A noun in front of a letter that is part of a name: vitamin C.
LETTERED = word_set(
    """
    vitamin vitamins hepatitis type types group class grade plan influenza team generation section schedule appendix
    exhibit compound element curve graph substance
    """
)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?", text.casefold()))


def speaks_against(text: str) -> bool:
    """Do words take back what was said before them?"""
    return any(word in _TURNING or word.endswith(("n't", "n’t")) for word in words_of(text))


# -- letters

_BEST = r"(?:correct|right|best|final|only|most (?:likely|appropriate|accurate|suitable)|(?:correct|right) and best)"
_CHOICE = re.compile(
    rf"(?:> )?(?:(?:so|thus|hence|therefore|i choose|i would choose|i pick),? )?(?:(?:(?:the|my|our) )?(?:{_BEST} ){{0,2}}"
    r"(?:option|choice|answer)(?: is)?(?: (?:option|choice))?:? )?"
    r"[(\[]?(?P<letter>[a-z])(?P<close>[)\].:]{0,2})"
    rf"(?:(?P<best> is (?:(?:the|my|our) )?(?:{_BEST}|{_BEST}? ?(?:answer|option|choice|one)))"
    r"|,? (?:because|since|as) (?P<why>.*)|(?<=[)\].:]) (?P<text>.*)| \((?P<aside>.*)\)| -{1,2} (?P<dash>.*))?",
    re.DOTALL | re.IGNORECASE,
)
_LETTERED_ANSWER = re.compile(r"[(\[]?([A-J])(?:[)\]][.:]?|[.:]) (?![^\W\d_]\. ?[^\W\d_])(.+)", re.DOTALL)
# Words that speak about an option instead of being one.
_JUDGING = word_set(
    """
    option options choice choices answer answers guess guesses guessed guessing pick picks picked picking choose
    chooses chose chosen choosing select selected selecting eliminate eliminates eliminated eliminating elimination
    discard discards discarded exclude excludes excluded excluding reject rejects rejected rejecting dismiss dismissed
    ruled crossed refuted refutes disproved disproven disproves invalid invalidated discounted removed dropped skipped
    struck skip out wrong incorrect inaccurate correct right untrue mistaken mistake mistakes error errors erroneous
    fail fails failed implausible unlikely improbable doubtful doubt doubts dubious unsure uncertain nonsense
    nonsensical absurd lie lies contradicts contradicted contradiction contradictory distractor trap decoy tempting
    temptation maybe perhaps possibly probably supposedly allegedly apparently seemingly wait actually instead rather
    however although though hmm hm oops sorry nope nah nay no not never neither nor cannot ignore ignored disregard
    disregarded except unless unlike whichever whatever unsupported unsuitable irrelevant inapplicable question but
    yes bad worse worst myself otherwise
    """
)
_TALK = re.compile(
    r"(?:and|or|plus|also|too|as|so|then|can|could|should|would|must|may|might|will|is|are|was|were|be|been|has|had|have|does|do|"
    r"did|seems?|looks?|sounds?|appears?|feels?|makes?|goes|i|we|you|my|our|this|that|which|who|vs|versus|i'm|i'd|i've|isn't|"
    r"everything|anything|every|both|all|any|each|other|others|another|again|still|only|first|second|last|next|came|comes|got|gets|"
    r"though|at first|see|hold on|forget|scrap|ditch|strike|drop|skip|runner|n/a|close|[a-z]{2,}ly|[a-z]{3,}ed)(?![^\W_'])"
)
_SET = re.compile(  # phrases of options that hold such words
    r"(?-i:No|Yes|True|False|Impossible|Neither|None|Right|Left|Out|All|Both|First|Second)"
    r"|(?:both|all|none|neither|either|two|any) of (?:the )?(?:above|these|those|them|others)"
    r"|not enough (?:information|info|data)(?: (?:given|provided|available|to (?:tell|determine|decide|answer)))?"
    r"|(?:it )?(?:cannot|can't|can not) be (?:determined|known|inferred)(?: from (?:the|this) [a-z]{1,20})?"
    r"|no (?:change|changes|solution|solutions|real solutions?|effect|difference|relationship|correlation|reaction|error)"
    r"|not (?:given|mentioned|stated|possible|defined|applicable)|if and only if|(?:it )?(?:does|do|will|would) not change"
    r"|(?:increase|decrease|reduce|unite)d(?: \w{1,20}){0,4}",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[(\[][a-z][)\]]|(?<![\w'])[a-z]\)", re.IGNORECASE)
_ALONE = re.compile(r"(?<![\w'\\^_{])([A-Z]|[b-j])(?![\w'])")
_PROSE = re.compile(r"(?<![\\a-zA-Z])(?!(?:sin|cos|tan|log|ln|exp|lim|max|min|mod|gcd)(?![a-z]))[^\W\d_]{2,}")


def same_letter(said: str, right: str) -> bool:
    """Choices in any case; of variables r is not R."""
    return said == right or (said.casefold() == right.casefold() and right.casefold() in "abcdefgh" + "j")


def lettered(answer: str) -> tuple[str, str] | None:
    """The letter and the text of an answer that has both, as in "B. Paris"."""
    found = _LETTERED_ANSWER.fullmatch(answer)
    return (found[1], found[2]) if found else None


def same_choice(said: str, right: str) -> str | None:
    """What stands behind the right letter, maybe ""; None where another is chosen, or it may be taken back."""
    found = _CHOICE.fullmatch(said)
    if found is None or not same_letter(found["letter"], right):
        return None
    text, aside, dash, why = found.group("text", "aside", "dash", "why")
    more = text or aside or dash
    if not (more or why or found["best"]):
        return ""
    if found["letter"].casefold() not in "abcdefghij":
        return None
    if found["best"]:
        return ""
    if why is not None:
        return "" if _is_reason(why) else None
    # A (5) may be a function's value, A - 5 a difference
    if more is None or not (text or (found["letter"].isupper() and _PROSE.search(more))):
        return None
    return more if _is_option(more) else None


def bare_letter(answer: str) -> str | None:
    """The letter that an answer is."""
    found = _CHOICE.fullmatch(answer)
    return found["letter"] if found and not any(found.group("text", "aside", "dash", "why", "best")) else None


def _is_option(text: str) -> bool:
    """Is it what an option may say, and no word on this choice or another one?"""
    if _SET.fullmatch(text.rstrip(".")):
        return True
    if _BRACKETED.search(text) or _TALK.match(text.casefold().lstrip("([\"'*-– ")) or _other_letter(text):
        return False
    words = words_of(text)
    return words.isdisjoint(_JUDGING) and not any(word.endswith("n't") for word in words) and "?" not in text


def _other_letter(text: str) -> bool:
    formula = not _PROSE.search(text) and re.search(r"[\d=+^\\]", text)
    for found in _ALONE.finditer(text):
        before = text[max(0, found.start() - 24) : found.start()].casefold().split()
        behind = text[found.end() : found.end() + 16]
        if formula and (found[1].islower() or re.match(r" ?= ?[\d\\a-z-]", behind)):
            if len(text) > 2:
                continue
        elif before and before[-1] in LETTERED:
            continue
        elif found[1] in "AI" and re.match(r" (?!(?:is|was|are|and|or|not|too|has|would|seems|looks)(?!\w))[a-z]{2}", behind):
            continue  # an article
        elif re.match(r"\. ?[A-Z]", behind) and not before:
            continue  # initials
        return True
    return False


# -- yes and no

_AGAINST = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_IT = r"(?:it|this|that|they|these|those|he|she|there|we|i|you)"
_IS = r"(?:is|are|was|were|does|do|did|has|have|had|can|could|will|would|should|must|may|might)"
_VERDICT = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?"
    r"(?:(?:(?:the|this|that) (?:statement|claim|assertion|proposition|sentence|conjecture|answer)|it|this|that|answer) is )?"
    rf"(?P<word>yes|no|true|false)(?:!|(?:[.!;,]{{1,2}} (?=[^\W\d])|[!;,] (?=\d\S{{0,9}} [a-z]))(?P<more>.*)"
    rf"| -{{1,2}} (?P<dash>.*)| \((?P<aside>.*)\)"
    rf"|,? (?P<why>(?:because|since|as) .*)| (?P<it>{_IT} .*))?",
    re.DOTALL,
)
_DENIAL = word_set(
    """
    no not never none nope nah nay neither nor nobody nothing cannot hardly scarcely barely unlikely doubtful wrong
    incorrect false untrue inaccurate invalid impossible improbable implausible mistaken erroneous unfounded nonsense
    lie lies lying fake myth hoax fail fails failed fallacy fallacious contrary opposite except unless without lacks
    lack denies denied refuses doubt doubts disproved disproven refuted refutes contradicts contradiction
    contradictory absurd negative joke joking kidding bogus rubbish garbage bunk hogwash baloney falsehood fiction
    fictional fabricated ludicrous ridiculous
    """
)
_TURNS = word_set(
    """
    but wait actually instead rather however although though if else hmm oops sorry maybe perhaps possibly probably
    unless except sometimes partly partially depends depending unsure uncertain yet otherwise either or
    """
)
_NEVER = word_set("nope nah nay wrong incorrect untrue lie mistaken")
_AFFIRMING = word_set(
    """
    yes yeah yep yup ya sure true correct right indeed agree agreed exactly absolutely certainly affirmative
    definitely course surely truly accurate valid holds stands doubt doubtless
    """
)
_UN = re.compile(r"(?:un|im|in|dis|mis|non|ir|il)[a-z]{4,}")
_NOT_NOT = re.compile(r"(?:\bnot|n't) (?:\w{1,20} )?(?:false|wrong|(?:un|im|in|dis|mis)[a-z]{4,})")
_NOT_UN = word_set("indeed important inside included including under understood until united international india insects")


def same_verdict(said: str, right: str) -> bool | None:
    """Is it the yes or no, true or false that is right? None where the right answer is none of these."""
    right = right.casefold()
    if right not in _AGAINST:
        return None
    said = said.casefold()
    found = _VERDICT.fullmatch(said)
    if found is None or found["word"] != right or (right in ("yes", "no") and re.match(r"(?:it|this|that) is ", said)):
        return False
    more = next((part for part in found.group("more", "dash", "aside", "why", "it") if part), None)
    if more is not None and _RETRACTS.search(more):
        return False
    return more is None or not (_takes_back_yes if right in ("yes", "true") else _takes_back_no)(more, right)


_RETRACTS = re.compile(
    r"(?<!\w)(?:scratch|take|retract|forget|strike|disregard|ignore)s? (?:that|it|this)(?!\w)|on second thought"
)


def _takes_back_yes(more: str, word: str) -> bool:
    words = words_of(more)
    if not words.isdisjoint(_TURNS) or _AGAINST[word] in words or "?" in more:
        return True
    reason = re.match(r"(?:because|since|as) ", more)
    if reason and _is_reason(more[reason.end() :]):
        return False
    if not words.isdisjoint(_DENIAL) or any(word.endswith("n't") for word in words):
        return True
    adjectives = re.findall(r"(?:is|are|was|were|be|been|seems|looks|'s) (?:(?:an?|very|quite|so|just) )?([a-z]+)", more)
    return any(_UN.fullmatch(word) and word not in _NOT_UN for word in adjectives)


def _takes_back_no(more: str, word: str) -> bool:
    """What it denies is no denial of itself; what it affirms is."""
    rest = re.sub(
        r"(?:\b(?:not|never|cannot|hardly)|n't)(?: (?:be|been|the|a|an|at all|quite|really|always|even))*"
        r"(?: (?:true|correct|right|accurate|valid|sure))?",
        " never",
        more,
    )
    words = words_of(rest)
    if not words.isdisjoint(_TURNS | _AFFIRMING | {_AGAINST[word]}) or "?" in more or _NOT_NOT.search(more):
        return True
    # it does: what is left out is the question
    return re.search(rf"\b{_IS}(?: so| too)?(?:$|[.,;:!)])|\b{_IT} (?:does|do|did) (?!never)", rest) is not None


def _is_reason(why: str) -> bool:
    """A clause that speaks of something else than the answer itself, or denies nothing; of no other choice."""
    words = words_of(why)
    if len(words) < 2 or not words.isdisjoint(_TURNS) or _BRACKETED.search(why) or _other_letter(why) or "?" in why:
        return False
    denies = not words.isdisjoint(_DENIAL - {"without"}) or any(word.endswith("n't") for word in words)
    about = re.match(rf"(?:{_IT}|(?:the|my) (?:answer|statement|claim|option|choice)|not|no|never)(?!\w)", why, re.IGNORECASE)
    return not (denies and about) and words.isdisjoint(_NEVER)
