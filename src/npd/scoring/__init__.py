"""Likelihoods and teacher top-k: one file per kind of teacher."""

from npd.scoring.prefill import Prefill, Reading, ScoreStudent, ScoreTeacher

__all__ = ["Prefill", "Reading", "ScoreStudent", "ScoreTeacher"]
