"""y ~ student: one file per engine."""

from npd.rollout.transformers import TransformersRollout

__all__ = ["TransformersRollout"]
