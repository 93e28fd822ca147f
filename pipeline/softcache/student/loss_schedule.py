"""Temperature and alpha of every step of a run, where they change: by schedule, by held-out loss, or learnt.

    mix = adaptation.mix(step=..., epoch=...)     before each piece of a batch
    adaptation.update(factor)                     after the step: theta of the curriculum moves, if there is one
    adaptation.end_epoch(row)                     after the epoch's evaluation

Schedules are functions of the step and of the finished epochs' held-out losses (`losses.schedules`); theta and its
momentum go into the checkpoint's progress as two numbers. The gradient by theta is averaged over the processes, as the
student's is, so that all of them hold the same T. theta is no part of the student: not of its weights, its optimizer, its
weight decay or its clipped norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from softcache.errors import RunError
from softcache.losses import LossMix, LossSettings, scheduled

__all__ = ["LossScheduler"]


class LossScheduler:
    """What changes in a run's loss.

    Args:
        loss: with a schedule or a curriculum.
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, loss: LossSettings, accelerator: Accelerator, *, num_steps: int) -> None:
        self._loss, self._accelerator, self._num_steps = loss, accelerator, num_steps
        self._losses: list[float] = []
        self._last: LossMix = LossMix(loss.temperature, loss.alpha)
        self._theta: torch.Tensor | None = None
        if loss.curriculum is not None:
            theta = torch.tensor(loss.curriculum.theta(loss.temperature), device=accelerator.device)
            self._theta, self._velocity = theta.requires_grad_(), torch.zeros_like(theta)

    def mix(self, *, step: int, epoch: int) -> LossMix:
        """The temperature and alpha of a step; with a curriculum T is a float32 tensor [] with a reversed gradient.

        Args:
            step: optimizer steps that lie behind.
            epoch: the step's.
        """
        loss = self._loss
        how: dict[str, Any] = {"step": step, "num_steps": self._num_steps, "losses": self._losses}
        alpha = scheduled(loss.alpha_schedule, loss.alpha, **how)
        if self._theta is None:
            self._last = LossMix(scheduled(loss.temperature_schedule, loss.temperature, **how), alpha)
            return self._last
        assert loss.curriculum is not None
        temperature = loss.curriculum.temperature(self._theta, epoch=epoch)
        self._last = LossMix(temperature.detach(), alpha)
        return LossMix(temperature, alpha)

    @property
    def last(self) -> dict[str, float]:
        """Temperature and alpha of the last step that was mixed."""
        return {"temperature": float(self._last.temperature), "alpha": self._last.alpha}

    def update(self, factor: float) -> None:
        """Moves theta by what the step's pieces left in its gradient; `factor` is that of the learning rate."""
        if self._theta is None:
            return
        settings = self._loss.curriculum
        assert settings is not None
        gradient = self._theta.grad
        if gradient is None:  # alpha is 0
            gradient = torch.zeros_like(self._theta)
        gradient = self._accelerator.reduce(gradient, reduction="mean")
        with torch.no_grad():
            self._velocity.mul_(settings.momentum).add_(gradient)
            self._theta -= settings.lr * factor * self._velocity
        self._theta.grad = None

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Takes note of an epoch's row of the history."""
        self._losses.append(float(row["eval_loss"]))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the history; JSON."""
        state: dict[str, Any] = {"last": self.last}
        if self._theta is not None:
            state["curriculum"] = {"theta": self._theta.item(), "velocity": self._velocity.item()}
        return state

    def load_state_dict(self, state: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Goes on where a checkpoint was saved; `state` is empty at the beginning of a run.

        Raises:
            RunError: a run that has begun lacks its learnt temperature.
        """
        self._losses = [float(row["eval_loss"]) for row in history]
        if "last" in state:
            self._last = LossMix(**state["last"])
        if self._theta is None:
            return
        curriculum = state.get("curriculum")
        if curriculum is None:
            if history:
                raise RunError(
                    "checkpoint: holds no learnt temperature for loss.curriculum, though the run has begun; remove the "
                    "run's folder to begin it anew"
                )
            return
        with torch.no_grad():
            self._theta.fill_(curriculum["theta"])
            self._velocity.fill_(curriculum["velocity"])
