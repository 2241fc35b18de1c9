"""Tasks of reasoning-gym: problems made from a seed, with verifiers."""

from __future__ import annotations

from typing import Any

from npd.config import TaskConfig
from npd.errors import UserError
from npd.evaluation import BenchmarkSetting, VerifiedTask

DEFAULT_SIZE = 128


class ReasoningGym(VerifiedTask):
    """A task by reasoning-gym's own name."""

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting) -> None:
        import reasoning_gym

        size = task.size or DEFAULT_SIZE
        try:
            self.options = {"size": size, "seed": task.seed, **task.options}
            dataset = reasoning_gym.create_dataset(task.name, **self.options)
            self.entries: list[Any] = [dataset[i] for i in range(size)]
        except Exception as error:  # unknown names and options raise whatever the task's own checks do
            raise UserError(
                f"evaluation.tasks: {task.name!r} with options {task.options} is no task: {error}. Give a reasoning-gym task "
                "or `answer`; `plugins` brings others."
            ) from error
        super().__init__(task, setting, [setting.chat.question(entry["question"]) for entry in self.entries])

    def score(self, problem: int, text: str) -> float:
        return self.verifier.task(text, self.task.name, self.options, self.entries[problem]) or 0.0
