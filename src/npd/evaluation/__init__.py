"""Tasks with verifiers, pass@k, and the distance to the teacher on held-out prompts."""

from npd.evaluation.evaluate import Evaluator

__all__ = ["Evaluator"]
