"""Tasks with verifiers, pass@k, and the distance to the teacher on held-out prompts."""

from npd.evaluation.evaluate import Evaluator, Task, load_task

__all__ = ["Evaluator", "Task", "load_task"]
