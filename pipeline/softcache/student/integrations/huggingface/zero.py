"""What ZeRO-3 of DeepSpeed needs here: whole weights for the checks of a model, and a head that is used outside its module.

ZeRO-3 keeps a share of each weight in each process, and gathers those of a module when that module runs. The loss reads the
head's weight without running the head, which DeepSpeed calls an external parameter of the module that runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from softcache.student.tasks import TokenStudent

__all__ = ["register_head", "whole_weights", "zero_stage"]


def zero_stage(trainer: Any) -> int:
    """Returns the stage of ZeRO that a Trainer is to use; 0 without DeepSpeed."""
    if not getattr(trainer, "is_deepspeed_enabled", False):
        return 0
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage)


def whole_weights(trainer: Any) -> AbstractContextManager[Any]:
    """Returns a context in which weights that ZeRO-3 has partitioned are whole on every process, and read only."""
    parts = [parameter for parameter in trainer.model.parameters() if hasattr(parameter, "ds_id")]
    if not parts:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parts)
    return gathered


def register_head(trainer: Any, student: TokenStudent) -> None:
    """Has ZeRO-3 gather the head for as long as the model runs; does nothing elsewhere, or a second time."""
    if zero_stage(trainer) != 3 or getattr(student, "_has_registered_head", False):
        return
    import deepspeed

    for parameter in student.head_parameters():
        deepspeed.zero.register_external_parameter(student.model, parameter)
    student._has_registered_head = True  # type: ignore[assignment]
