"""A benchmark: does the student stop by itself, and after how many tokens?"""

import numpy as np

from npd.config import TaskConfig
from npd.errors import UserError
from npd.evaluation import Benchmark, BenchmarkSetting, Student
from npd.intervals import wilson_interval
from npd.registry import BENCHMARKS


class Stops(Benchmark):
    """Answers the prompts of data.eval."""

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting) -> None:
        super().__init__(task, setting)
        if setting.held_out is None:
            raise UserError("evaluation.tasks has `stops`, which answers the prompts of data.eval; set data.eval.")
        self.prompts = setting.held_out.table

    def __call__(self, student: Student) -> dict[str, float]:
        answered = student.write(self.prompts, self.setting.sampling, seed=0, title="evaluate stops")
        stopped = np.array([reason == "stop" for reason in answered["finish_reason"].to_pylist()])
        low, high = wilson_interval(stopped.mean(), len(stopped))
        tokens = np.mean([len(ids) for ids in answered["response_ids"].to_pylist()])
        return {"stops/share": stopped.mean(), "stops/share_low": low, "stops/share_high": high, "stops/length": tokens}


BENCHMARKS.register("stops", Stops)
