"""Running averages of a student's weights (EMA), which are then what is scored and saved.

After step n, counted from 1, the average keeps d_n = min(decay, n / (n + 9)) of itself and takes 1 - d_n of the weights, so
that a short run is not held at its first weights. Running statistics of batch norms are averaged alike; what is not floating
point, such as their counts, is copied.

References:
    Polyak, Juditsky 1992; Tarvainen, Valpola 2017, arXiv 1703.01780; the warm-up of TensorFlow's ExponentialMovingAverage.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """The average of a model's weights over the steps of a run, float32 or wider as they are.

    Attributes:
        module: a copy of the model that holds it, in evaluation mode; what is frozen in the model is frozen in it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = deepcopy(model).eval()
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in a model's weights after a step."""
        self._steps += 1
        share = 1 - min(self._decay, self._steps / (self._steps + 9))
        pairs = zip(_tensors(self.module), _tensors(model), strict=True)
        for average, now in pairs:
            if average.is_floating_point():
                average.lerp_(now, share)
            else:
                average.copy_(now)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        self.module.load_state_dict(state["module"])


def _tensors(model: nn.Module) -> chain[torch.Tensor]:
    return chain(model.parameters(), model.buffers())
