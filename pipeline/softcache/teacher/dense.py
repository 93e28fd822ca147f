"""A frozen detector as a teacher: all cells of some images in, the records of the chosen ones out.

What a detector is (its anchors, its head, which cell stands for a box) is the subclass's; what is kept of it is here and in
`softcache.labels.sparsify.detection`. A chunk is a whole batch: the outputs of B images at A cells of V classes take 4 B A
V bytes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from softcache.data.boxes import DetectionBatch
from softcache.errors import LabelError
from softcache.labels import DetectionLabels
from softcache.labels.sparsify import DenseOutputs, LabelSettings, cell_faults, sparsify_cells
from softcache.teacher.base import Teacher

__all__ = ["DenseTeacher"]


class DenseTeacher(Teacher):
    """A detector in evaluation mode.

    Attributes:
        distribution: of a cell: "bernoulli" of a sigmoid head; "categorical" of a softmax whose class 0 is the background.
        grid: the digest of its cells (anchors or locations, strides, how boxes are coded).
        num_cells: A.
        columns: the head's other outputs by the names of `DetectionLabels.columns`, with their inner shapes.
        num_classes: V of the head; of a softmax with the background.
    """

    distribution: Literal["bernoulli", "categorical"]
    grid: str
    num_cells: int
    columns: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def outputs(self, batch: DetectionBatch) -> DenseOutputs:
        """Returns what the detector says of a batch, on the teacher's device, and which cells stand for its boxes."""

    @torch.inference_mode()
    def chunks(self, batch: DetectionBatch) -> Iterator[Any]:
        """Yields the `DenseOutputs` of the whole batch.

        Raises:
            LabelError: they are of another shape than the teacher said.
        """
        outputs = self.outputs(batch)
        expected = {"logits": (len(batch), self.num_cells, self.num_classes)} | {
            name: (len(batch), self.num_cells, *shape) for name, shape in self.columns.items()
        }
        found = {name: tuple(x.shape) for name, x in {"logits": outputs.logits, **outputs.columns}.items()}
        if found != expected or len(outputs.truth) != len(batch):
            raise LabelError(
                f"teacher {self.spec}: expected outputs of shape {expected} and the truth of {len(batch)} images; found "
                f"{found} and {len(outputs.truth)}; the head must have one output per class and cell of the grid"
            )
        yield outputs

    @torch.inference_mode()
    def label(  # type: ignore[override]
        self, batch: DetectionBatch, settings: LabelSettings, *, chunks: Iterable[Any] | None = None
    ) -> tuple[DetectionLabels, torch.Tensor]:
        """Returns the record of the batch's chosen cells, and the faults [P] uint8, on the device.

        Raises:
            LabelError: an image has more ground-truth cells than rows; the sample is named.
        """
        records: list[DetectionLabels] = []
        faults: list[torch.Tensor] = []
        for outputs in self.chunks(batch) if chunks is None else chunks:
            try:
                records.append(sparsify_cells(outputs, settings, distribution=self.distribution))
            except LabelError as error:
                if error.position is None:
                    raise
                sample = int(batch.samples[error.position])
                raise LabelError(f"sample {sample}, view {batch.view}: {error}") from error
            faults.append(cell_faults(outputs, distribution=self.distribution))
        faults_P = torch.cat(faults).repeat_interleave(settings.positions.top)
        return DetectionLabels.concat(records), faults_P

    def score(self, batch: Any) -> tuple[float, int]:
        """Raises: a detector's quality is its mean average precision, and not a sum over rows.

        Raises:
            LabelError: always.
        """
        raise LabelError(
            f"teacher {self.spec}: a detector has no accuracy of its rows, only a mean average precision; set "
            "capture.evaluate = false"
        )
