"""Curriculum temperature: one T for all rows, learnt against the student, which is learnt to be as hard as it can be.

With a number theta, T = lowest + range * sigmoid(theta). The student descends the loss; theta, by gradient reversal,
ascends it, and the more so the longer the run goes:

    d loss / d theta  is replaced by  -strength * d loss / d theta
    strength in epoch e = max_strength * (1 - cos(pi min(e, growth_epochs) / growth_epochs)) / 2

where the loss is the one that is trained, T^2 and all. theta then takes steps of gradient descent with momentum, at `lr`
times the student's own warm-up and decay. In the first epoch the strength is 0, and T is loss.temperature.

References:
    Li, Li, Yang, Zhao, Song, Luo, Li, Yang 2023, "Curriculum temperature for knowledge distillation", AAAI, arXiv
    2211.16231: the global version, and its settings, range 20 above 1 and a strength that grows over 10 epochs. Its own
    code begins at theta = 1, a T of 15.6.
"""

import math
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor

from softcache.settings import Settings

__all__ = ["CurriculumSettings", "reversed_gradient"]


class CurriculumSettings(Settings):
    """[loss.curriculum]: the temperature is learnt, beginning at loss.temperature.

    Attributes:
        lowest: T stays above it.
        range: and below `lowest + range`.
        growth_epochs: epochs until the reversal has its full strength.
        max_strength: that strength.
        lr: step size for theta.
        momentum: of these steps.
    """

    lowest: float = Field(1.0, ge=1, le=99)
    range: float = Field(20.0, gt=0, le=99)
    growth_epochs: int = Field(10, ge=1)
    max_strength: float = Field(1.0, gt=0)
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)

    def strength(self, epoch: int) -> float:
        """How much of the gradient is reversed in an epoch, in [0, max_strength]."""
        share = min(epoch, self.growth_epochs) / self.growth_epochs
        return self.max_strength * (1 - math.cos(math.pi * share)) / 2

    def theta(self, temperature: float) -> float:
        """The number that stands for a temperature."""
        share = (temperature - self.lowest) / self.range
        return math.log(share / (1 - share))

    def temperature(self, theta: Tensor, *, epoch: int) -> Tensor:
        """T [] of theta [], differentiable in it, with the reversed gradient.

        Examples:
            >>> settings = CurriculumSettings(growth_epochs=1)
            >>> theta = torch.tensor(settings.theta(4.0), requires_grad=True)
            >>> T = settings.temperature(theta, epoch=1)
            >>> T.backward()
            >>> round(float(T), 4), bool(theta.grad < 0)
            (4.0, True)
        """
        return self.lowest + self.range * reversed_gradient(theta, self.strength(epoch)).sigmoid()


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


def reversed_gradient(x: Tensor, strength: float) -> Tensor:
    """`x`, whose gradient is multiplied by -strength on its way back.

    References:
        Ganin, Lempitsky 2015, "Unsupervised domain adaptation by backpropagation", arXiv 1409.7495, section 3.
    """
    return cast(Tensor, _Reversed.apply(x, strength))
