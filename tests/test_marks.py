"""Where a response says its answer: by composition of marks, and of what may stand before and behind them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.answers.marks import extract_answer, is_marked
from npd.verifiers import is_correct

# -- which mark counts

LINES = {
    "tags": ["<answer>{}</answer>", "<Answer> {} </Answer>", "so <answer>{}</answer> and more"],
    "box": ["\\boxed{{{}}}", "so $\\boxed{{{}}}$.", "thus x = \\boxed {{{}}},", "**\\boxed{{{}}}**", "> ## \\boxed{{{}}}"],
    "hash": ["#### {}", "1+1=2;#{}", "**#### {}**"],
    "answer": ["The answer is {}.", "**Answer:** {}", "So the final answer is: **{}**", "Answer: {}"],
    "": ["{}", "so it is {}", "  {}  "],
}
NUMBERS = st.integers(100, 999).map(str)
SAID = st.sampled_from(list(LINES)).flatmap(lambda kind: st.tuples(st.just(kind), st.sampled_from(LINES[kind]), NUMBERS))


@given(st.lists(SAID, min_size=1, max_size=6))
def test_the_last_of_the_clearest_marks_counts(lines):
    text = "\n".join(line.format(value) for _, line, value in lines)
    kinds = [kind for kind, _, _ in lines]
    best = next(kind for kind in LINES if kind in kinds)
    at = len(kinds) - 1 - kinds[::-1].index(best)
    if best == "box" and "answer" in kinds[at:]:  # who goes on and names another answer means that one
        at = len(kinds) - 1 - kinds[::-1].index("answer")
    right = lines[at if best else -1][2]
    assert is_correct(text, right)
    assert all(is_correct(text, value) == (value == right) for _, _, value in lines)
    assert is_marked(text) == bool(best)


@given(SAID, SAID, st.sampled_from(["think", "thinking", "thought"]), st.booleans())
def test_thoughts_are_no_answer(thought, said, tag, opened):
    """A chat template may have opened them already."""
    inner, outer = (line.format(value) for _, line, value in (thought, said))
    text = f"<{tag}>" * opened + f"{inner}\n</{tag}>\n\n{outer}"
    assert is_correct(text, said[2])
    assert is_correct(text, thought[2]) == (thought[2] == said[2])
    assert not is_correct(f"<{tag}>\n{inner}", thought[2])


@pytest.mark.parametrize(
    "text", ["\\boxed{}", "<answer></answer>", "<answer> </answer>", "answer: ", "an answer", "I can't answer that", ""]
)
def test_an_empty_mark_is_none(text):
    assert not is_marked(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{a \{ b}", r"a \{ b"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        (r"$(\boxed{1}, \boxed{2})$", "(1, 2)"),
        (r"$x=\boxed{5}$ or $x=\boxed{6}$", "5, 6"),
        ("B is the correct answer.", "B"),
        ("The answer is\n\\[\n\\frac{1}{2}\n\\]", r"\frac{1}{2}"),
        ("Answer:\n```\n5\n```\nThat is all.", "5"),
        ("The answer is 5.\nThis answer is correct.\nThe answer makes sense.", "5."),
        ("The answer is Paris. It is the capital.", "Paris."),
        ("Answer: J. K. Rowling", "J. K. Rowling"),
        ("The answer is 5.\n\n#math", "5."),
        ("<answer>##\n#.</answer>", "##\n#."),
        ("<answer>#### 15</answer>", "15"),
        ("<answer>a<answer>b</answer>", "b"),
        ("<answer>5</answer> no, <answer>6", "6"),
    ],
)
def test_answers_are_found(text, answer):
    assert extract_answer(text) == answer


# -- what stands beside an answer

ANSWERS = st.sampled_from(
    ["5", "-5", "3/4", "B", "Paris", "Yes", "(1, 2)", "x^2+1", "2\\sqrt{3}", "\\frac{1}{2}", "5 cm", "\\$5", "50\\%"]
)
RIGHT = [
    "<answer>\\boxed{%}</answer>", "#### \\boxed{%}", "#### $\\boxed{%}$", "### \\boxed{%}",
    "<think>7</think>\n$$\\boxed{%}$$<|im_end|>", "**Final Answer**\n\\[ \\boxed{%} \\]", "∴ \\boxed{%}",
    "<b>\\boxed{%}</b>", "\\huge\\boxed{%}", "\\text{Answer: }\\boxed{%}", "So the answer is $\\boxed{%}$.",
    "Therefore, the answer is: $\\boxed{%}$.", "> \\boxed{%}", "Step 3: \\boxed{%}", "\\boxed{%}<|eot_id|>",
    "which simplifies to \\boxed{%}.", "is equal to \\boxed{%}", "the value is\n\\boxed{%}", "\\boxed{%}\\tag{1}",
    "\\boxed{%} ✓", "$x=\\boxed{%}$ as the only solution", "\\boxed{%} where $n>0$", "\\boxed{%} (since $n>0$)",
    "\\boxed{%}, because $2+3=5$", "The number of integers that are not prime is \\boxed{%}",
    "an area of \\boxed{%}", "\\boxed{%}\n\nThis matches what we expected.", "答案是\\boxed{%}",
    "Die Antwort ist \\boxed{%}", "The result is approximately $\\boxed{%}$", "\\boxed{%}.\nNote that 3+2=5.",
    "<answer>The answer is \\boxed{%}.</answer>", "<answer>Steps...\n\n\\boxed{%}</answer>",
    "Answer: %\n\nLet me know if you need more!", "The answer is %\nThis answer is correct.",
    "The answer is %\n\nYour answer was great!", "The answer would be %", "The answer is, %",
    "The answer is equal to %", "the answer therefore is %", "(Answer: %)", "**Final Answer:**\n**%**",
    "The answer to this problem is: %", "The correct answer is **%**.", "The answer is:\n\n$$\n%\n$$",
    "% is the correct answer.", "Therefore, % is the answer.",
    "So it is $\\boxed{%}$, achieved at $x=2$.", "\\boxed{%}\n\nThe final answer is in simplest form.",
    "\\boxed{%}\n\nTherefore, the correct answer is %",
]  # fmt: skip
BEFORE = [
    "The number of apples > $", "area(", "The ratio is 1: ", "-\n", "$-$\n$", "minus the number ",
    "the negative number ", "negative: ", "the reciprocal ", "up to ", "close to ", "exceeds ", "beyond ", "near ",
    "anything but ", "nothing like ", "by no means ", "no longer ", "wrongly ", "isnt ", "Nobody would say ",
    "we exclude ", "wrong answer: ", "not: ", "答案不是", "至少", "大于", "マイナス", "ist nicht ", "n'est pas ", "no es ",
    "не ", "минус ", "it should not be ", "-", "2", "x^", "x + ", "6 or ", "6, ", "the square root of ",
    "at most ", "not ", "it isn't ", "half of ", "10 - ", "3 \\times ", "\\neq ", "\\sqrt",
]  # fmt: skip
BEHIND = [
    "; 6", ", \\frac{1}{2}", ", \\pi", ",\\infty", ", \\ldots, 9", ", \\text{6}", ", six", ", which is wrong",
    ", rejected", ", extraneous", ", scratch that", ", but actually 6", ", so the answer is 6",
    "; the answer is 6", ": is wrong", "... no", ". But actually it is 6.", "\n\nWait, that's wrong. It is 6.",
    "\n\\times 2", " or 6", " and 6", "\nNo, it is 6.", " (wrong)", "!", "^2", " + 1", " million",
    ", which does not satisfy the condition", " (which doesn't satisfy it)", ". This can't be correct.",
    ", which can't be correct", "\n\nThat's wrong: it should be 6.", "\n\nOn second thought, it is 6.",
    "\n\nI made an arithmetic error: it should be 6.", "\n\nI apologize for the confusion. 6.",
    "\n\nLet me correct that: 6", "\n\nThe correct value is 6.", "\n\nThus the answer is \\frac{6}{7}.",
    "\n\n**Final Answer: (C)**", "\n\nThus the answer is x = 6.",
]  # fmt: skip
OTHERWISE = [
    "The answer is **%** or 6", "The answer is **%**, or 6", "**Answer: %** or 6", "Answer: **%** **6**",
    "The answer is **%** million", "The answer is **%** - 6", "The answer is **%** is wrong",
    "The answer is **%**, but maybe **6**", "log(answer) = %", "answer^2 = %", "-answer = %",
    "2 times the answer = %", "Twice the answer is %", "The square of the answer is %", "If the answer is %",
    "The most common incorrect answer is %", "Wrong answers: %", "not #### %", "issue #%", "C#%",
    "not <answer>%</answer>", "-<answer>%</answer>", "<answer>%</answer> is wrong", "<answer>%</answer> <answer>6",
    "6 or\n%", "not\n%", "The answer is not %", "The answer isn't %", "I doubt the answer is %",
    "The answer is %.\nWait, no. It is 6.", "Answer: %\nActually, 6.", "#6 or #%", "The answer is %? No",
    "The answer is %. Or 6.", "\\boxed{6} or \\boxed{%}", "\\boxed{6} and \\boxed{%}", "\\boxed{%}, \\boxed{6}",
    "Suppose the answer is %", "<answer>%</answer>.6",
    "<answer>%</answer>\n\nWait, that's wrong. It is 6.", "#### %\nNo, that's wrong.",
    "<answer>A</answer> or <answer>%</answer>", "it cannot be <answer>%</answer>", "<answer>%</answer> million",
    "<answer>%</answer> + 6", "The answer is %.\n\nOn second thought, it is 6.",
    "The answer is %. This does not satisfy it.", "The answer is 5x or the answer is %.", "10 - answer = %",
    "3 + answer = %", "3 * answer = %", "The negative of the answer is %", "One less than the answer is %",
    "10% of the answer is %", "The log of the answer is %", "They are \\boxed{3} as well as \\boxed{%}",
    "\\boxed{5x} feet \\boxed{%} inches",
]  # fmt: skip


@given(ANSWERS)
def test_what_says_nothing_leaves_an_answer_as_it_is(answer):
    for frame in RIGHT:
        assert is_correct(frame.replace("%", answer), answer), frame.replace("%", answer)


@given(st.sampled_from(["5", "12", "0.5", "B", "Paris"]), st.sampled_from(["", "So it is ", "Now:\n"]))
def test_what_belongs_to_an_answer_makes_it_another(answer, lead):
    texts = [f"{lead}{before}\\boxed{{{answer}}}" for before in BEFORE]
    texts += [f"{lead}{opened}\\boxed{{{answer}}}{opened}{behind}" for behind in BEHIND for opened in ("", "$")]
    texts += [frame.replace("%", answer) for frame in OTHERWISE if answer[0].isdigit() or "#%" not in frame]
    assert not [text for text in texts if is_correct(text, answer)]


# -- hostile texts

LONG = 1 << 18
PIECES = [
    "<answer>", "<answer></answer>", "</answer>", "\\boxed{", "\\boxed{}", "\\boxed{5},", "answer", "answer\n",
    "answer is", "the answer is: ", "the correct ", "#", "####\n", "9,", "e9", ".9", "<think>", "</think>",
    "<|x|>", "**", "\\text{", "½", "(", "{", "wait, ", "not ", "is\n",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("filler", ["", "\n", " ", "*"])
def test_a_hostile_text_takes_no_more_than_its_length(piece, filler):
    began = time.process_time()
    for text in (piece * (LONG // len(piece)), piece + filler * LONG + "#", (piece + filler * 99) * 2000):
        is_correct(text, "7")
    assert time.process_time() - began < 20  # quadratic, each would take minutes


@given(st.text(), st.text())
def test_any_text_is_judged(text, answer):
    assert is_correct(text, answer) in (True, False)
