"""Two divergences between the teacher's top-k with its rest and the student's."""

import math

import torch
from torch import Tensor

from npd.registry import DIVERGENCES

LEAST = -40.0  # nats: what the teacher gives nothing would cost infinitely much


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """D_KL(student || teacher): Σ p_S (log p_S - log p_T)."""
    return student.exp() * (student - teacher.clamp(min=LEAST))


def jensen_shannon(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean of both models' KL to the mean of both."""
    teacher = teacher.clamp(min=LEAST)
    mean = torch.logaddexp(teacher, student) - math.log(2)
    return (teacher.exp() * (teacher - mean) + student.exp() * (student - mean)) / 2


DIVERGENCES.register("reverse_kl", reverse_kl)
DIVERGENCES.register("jensen_shannon", jensen_shannon)
