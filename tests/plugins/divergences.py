"""Two divergences between the teacher's top-k with its rest and the student's."""

import torch
from torch import Tensor

from npd.registry import DIVERGENCES

LEAST = -40.0  # nats: what the teacher gives nothing would cost infinitely much


def jeffreys(teacher: Tensor, student: Tensor) -> Tensor:
    """D_KL(teacher || student) + D_KL(student || teacher): Σ (p_T - p_S) (log p_T - log p_S)."""
    teacher = teacher.clamp(min=LEAST)
    return (teacher.exp() - student.exp()) * (teacher - student.clamp(min=LEAST))


def hellinger(teacher: Tensor, student: Tensor) -> Tensor:
    """Half the squared distance of the probabilities' square roots."""
    return torch.square((teacher / 2).exp() - (student / 2).exp()) / 2


DIVERGENCES.register("jeffreys", jeffreys)
DIVERGENCES.register("hellinger", hellinger)
