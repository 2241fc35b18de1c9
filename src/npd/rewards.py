"""Rewards for reinforcement learning, by the same verifiers that judge rollouts and evaluation.

They have the signature of TRL's GRPOTrainer: `f(prompts, completions, **columns) -> list[float | None]`, with a completion as
a string or as messages, and a row's further columns by name, one value a completion. TRL itself is not needed here
(`pip install 'npd[rl]'` brings it); examples/grpo.py puts the two together.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from npd.errors import UserError
from npd.prompts import ENTRY, SEPARATOR, answer_cell
from npd.store import Store
from npd.verifiers import Verifier, check_entries, is_marked

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["dataset", "marked", "verifiable", "verified"]

_verifier = Verifier()


def verified(prompts: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    """1.0 for a right completion, 0.0 for a wrong one; None where nothing verifies it, or its verifier could not judge it.

    A row says what is right in a column `answer` (a text or a number, or a list of them, of which any is right; or a cell as
    `dataset` gives them) or in a column `reasoning_gym` (an entry, or its JSON), as rows of data.train do. Rows that say
    nothing train nothing: `dataset` and `verifiable` leave them out. Of messages the assistant's last one is judged.

    Raises:
        UserError: there is neither column, a row's value is none that data.train may have, or an entry's task is unknown.
    """
    if columns.get("answer") is None and columns.get("reasoning_gym") is None:
        raise UserError(
            "npd.rewards.verified has nothing to judge completions by: the data has neither a column `answer` nor a column "
            f"`reasoning_gym`, but {', '.join(sorted(columns)) or 'no others'}.",
            "Rename the column that says what is right.",
        )
    answers, entries = (_column(name, columns.get(name), len(completions)) for name in ("answer", "reasoning_gym"))
    cells = [
        _cell(f"npd.rewards, completion {number}", answer, entry)
        for number, (answer, entry) in enumerate(zip(answers, entries, strict=True), 1)
    ]
    check_entries((cell for cell in cells if cell is not None), "npd.rewards was given")
    return [_verifier(text_of(completion), cell) for completion, cell in zip(completions, cells, strict=True)]


def _column(name: str, values: Any, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    if isinstance(values, str | dict) or len(values) != count:
        raise UserError(
            f"npd.rewards: `{name}` must have one value for each of {count:,} completions, as TRL hands them over."
        )
    return [_python(value) for value in _python(values)]


def _python(value: Any) -> Any:
    """Of NumPy's and Arrow's types what they hold."""
    method = next((name for name in ("tolist", "to_pylist", "as_py") if hasattr(value, name)), None)
    return getattr(value, method)() if method else value


def marked(prompts: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    """1.0 for a completion that marks its final answer (in <answer> tags, in \\boxed{}, behind # or "answer:"), else 0.0: a
    reward for the format."""
    return [float(is_marked(text_of(completion))) for completion in completions]


def text_of(completion: Any) -> str:
    """What a completion says: a string, or the last message of the assistant's; nothing where there is none.

    Raises:
        UserError: it is neither.
    """
    if completion is None or isinstance(completion, str):
        return completion or ""
    messages = [completion] if isinstance(completion, dict) else completion
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            f"npd.rewards: a completion must be a text or messages, but it is of type {type(completion).__name__}."
        )
    said = [message.get("content") for message in messages if (message.get("role") or "assistant") == "assistant"]
    last = said[-1] if said else None
    if isinstance(last, list | tuple):  # parts
        return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in last if part is not None)
    return str(last or "")


def _cell(where: str, answer: Any, entry: Any) -> str | None:
    """As data.train's rows are read; a cell as `dataset` gives it stays as it is."""
    if isinstance(answer, str) and (ENTRY in answer or SEPARATOR in answer):
        if answer.startswith(ENTRY):
            return answer_cell(where, None, answer.removeprefix(ENTRY))
        answer = answer.split(SEPARATOR)
    return answer_cell(where, answer, entry)


def verifiable(data: Dataset) -> Dataset:
    """The rows of a dataset that say what is right, as `verified` reads them.

    Raises:
        UserError: none does, or a row's value is none that data.train may have.
    """

    def known(row: dict[str, Any]) -> bool:
        cell = _cell("npd.rewards", _python(row.get("answer")), _python(row.get("reasoning_gym")))
        return cell is not None and bool(cell.strip())

    left = data.filter(known)
    if not len(left):
        raise UserError(
            f"None of {len(data):,} rows has an `answer` or a `reasoning_gym` entry: there is nothing to reward.",
            "Rename the column that says what is right, or give other data.",
        )
    return left


def dataset(run_dir: str | Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The prompts of a run that have something to verify by, as a dataset with the columns `prompt` (text) and `answer`.

    A prompt's text is such that `tokenizer(text)` gives the ids that the run read; those of which no text does are left out.

    Raises:
        UserError: this is no run's directory, or no prompt is left.
    """
    from datasets import Dataset

    rows, without = [], 0
    for row in Store(run_dir).prompts().table.select(["prompt_ids", "answer"]).to_pylist():
        if not (row["answer"] or "").strip():
            without += 1
        elif (text := _text(row["prompt_ids"], tokenizer)) is not None:
            rows.append({"prompt": text, "answer": row["answer"]})
    if not rows:
        why = "have no answer" if without else "cannot be written as text that the tokenizer reads as they were"
        raise UserError(f"The prompts of {run_dir} {why}: there is nothing to reward.", "Give other data, with answers.")
    return Dataset.from_list(rows)


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A text that the tokenizer turns into these ids; it may put a start token in front by itself."""
    for start in (0, 1):
        text = str(tokenizer.decode(ids[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if tokenizer(text)["input_ids"] == ids:
            return text
    return None
