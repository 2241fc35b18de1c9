"""Where a response says its answer, and whether that is the right one.

Inside, from below: `quantities` reads a number with its unit, whole or not at all; `writings` takes away what only shows a
text; `choices` are letters, yes and no; `formulas` compares formulas and words; `sameness` asks all of them whether two short
texts say the same; `beside` judges what stands before and behind an answer; `marks` finds it. All of it takes time linear in
a text's length: responses are untrusted.
"""

from npd.answers.marks import OPEN, extract_answer, final_answer, is_marked, marked_answer, without_thoughts
from npd.answers.sameness import same_answer

__all__ = ["OPEN", "extract_answer", "final_answer", "is_marked", "marked_answer", "same_answer", "without_thoughts"]
