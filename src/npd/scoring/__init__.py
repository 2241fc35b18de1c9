"""Likelihoods and teacher top-k: one file per kind of teacher."""

from npd.scoring.prefill import Prefill, Reader, Reading, ScoreStudent, ScoreTeacher
from npd.scoring.routed import Routed
from npd.scoring.served import ServedPrefill

__all__ = ["Prefill", "Reader", "Reading", "Routed", "ScoreStudent", "ScoreTeacher", "ServedPrefill"]
