"""The `answer` column of data.eval, compared with what a response says last."""

from __future__ import annotations

from npd.config import TaskConfig
from npd.errors import UserError
from npd.evaluation import BenchmarkSetting, VerifiedTask
from npd.prompts import verifiable


class Answers(VerifiedTask):
    """The prompts of data.eval, and what its `answer` column has for each."""

    needs = "answer"

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting) -> None:
        if setting.held_out is None:
            raise UserError("evaluation.tasks has `answer`, which compares with data.eval's answer column; set data.eval.")
        table = setting.held_out.table.slice(0, task.size)
        self.answers = table["answer"].to_pylist()
        if False in (known := verifiable(table["answer"]).to_pylist()):
            raise UserError(
                f"evaluation.tasks has `answer`, but {known.count(False):,} of {len(known):,} rows of data.eval have none, "
                f"such as row {known.index(False) + 1}.",
                "Add them, or leave these rows out.",
            )
        super().__init__(task, setting, table["prompt_ids"].to_pylist())

    def score(self, problem: int, text: str) -> float:
        return self.verifier(text, self.answers[problem]) or 0.0
