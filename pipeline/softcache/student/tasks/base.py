"""The interface between the training loop and a task: what a student is trained on and how it is scored.

A task builds the student, returns the mean loss of a batch's label rows, and evaluates on the unaugmented view of the
evaluation split. The loop (`softcache.student`) contains no code that is specific to images or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from softcache.data.batch import Dataset
from softcache.losses import LossMix
from softcache.student.tasks.inference import Serving

__all__ = ["OnlineTeacher", "PlainTask", "RowMeans", "Task", "even_batches", "is_sharded", "shard_batches"]


class OnlineTeacher(Protocol):
    """A frozen teacher that labels batches during training (`labels = "online"`); `softcache.teacher.Teacher` is one.

    Attributes:
        num_classes: V.
    """

    num_classes: int

    def chunks(self, batch: Any) -> Iterator[torch.Tensor]:
        """Yields float32 logits [p, V] that together cover the batch's rows in order."""
        ...


class Task(Protocol):
    """What a student is trained on and how it is scored.

    Attributes:
        metric: the key of an epoch's results by which epochs are compared.
        larger_is_better: whether a larger metric is better.
        evaluation: the evaluation split.
    """

    @property
    def metric(self) -> str: ...
    @property
    def larger_is_better(self) -> bool: ...
    @property
    def evaluation(self) -> Dataset: ...

    def build(self) -> nn.Module:
        """Returns a fresh student; called after the seed is set."""
        ...

    def loss(
        self, model: nn.Module, batch: Any, *, label_share: float | None = None, mix: LossMix | None = None
    ) -> torch.Tensor:
        """Returns the mean loss of the batch's rows, a scalar.

        Args:
            label_share: of all rows of the optimizer step that the batch is a piece of, the share with a label: summed
                by their rows, the pieces' losses are then the step's. None: the batch is the step, or each row has one.
            mix: this step's temperature and alpha; given where [loss] has them change over the run. None: those of [loss].

        A task of images takes `size`, too, the height that they are resized to; given where train.image_sizes is set.
        """
        ...

    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        """Returns `eval_loss` (nats), `accuracy` and what else there is, over all ranks."""
        ...

    def finish(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Returns what is scored once, when the training is over, over all ranks; all of them call this."""
        ...

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Returns what a weights file of the (unwrapped) model holds: tensors of the model, not copies."""
        ...

    def export(self, model: nn.Module, out: Path) -> None:
        """Writes the (unwrapped) model of the best epoch in the form that its users load, if there is one; called last."""
        ...

    def serve(self, model: nn.Module) -> Serving:
        """Returns the finished (unwrapped) model, or a teacher, as its users call it; it is moved to the CPU."""
        ...


class PlainTask:
    """A base of tasks whose student is one module, scored every epoch and kept as its weights."""

    build_model: Callable[[], nn.Module]

    def build(self) -> nn.Module:
        return self.build_model()

    def finish(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Nothing: all that is scored is scored every epoch."""
        return {}

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return model.state_dict()

    def export(self, model: nn.Module, out: Path) -> None:
        """Nothing: `model.safetensors` and the spec are all that is needed."""


def shard_batches(num_samples: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """Returns this rank's batches of an evaluation split, as even a share as whole batches allow."""
    batch_size = min(batch_size, max(1, -(-num_samples // accelerator.num_processes)))
    step = accelerator.num_processes * batch_size
    starts = range(accelerator.process_index * batch_size, num_samples, step)
    return [range(start, min(start + batch_size, num_samples)) for start in starts]


class RowMeans:
    """Means over the rows of all batches of all ranks, summed in float64."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.total_S: torch.Tensor | None = None  # a sum of each kind, then the rows

    def update(self, *values_P: torch.Tensor) -> None:
        """Adds a batch's rows: of each kind a value per row."""
        rows = torch.tensor(len(values_P[0]), dtype=torch.float64, device=values_P[0].device)
        sums_S = torch.stack([*(values.sum(dtype=torch.float64) for values in values_P), rows])
        self.total_S = sums_S if self.total_S is None else self.total_S + sums_S

    def compute(self, kinds: int) -> list[float]:
        """Returns the mean of each of `kinds` kinds; every rank calls it, also one that has no rows; NaN of no rows."""
        total_S = self.total_S
        if total_S is None:
            total_S = torch.zeros(kinds + 1, dtype=torch.float64, device=self.accelerator.device)
        total_S = self.accelerator.reduce(total_S, reduction="sum")
        return (total_S[:-1] / total_S[-1]).tolist()


def even_batches(batches: list[range], accelerator: Accelerator) -> list[range]:
    """Returns this rank's batches and as many more, which do not count, as the rank with the most batches has."""
    counts = accelerator.gather(torch.tensor([len(batches)], device=accelerator.device))
    return batches + [range(1)] * (int(counts.max()) - len(batches))


def is_sharded(model: nn.Module) -> bool:
    """Returns whether processes gather a model's weights from each other, by FSDP2; without importing that."""
    return any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)
