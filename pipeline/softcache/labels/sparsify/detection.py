"""Dense outputs into a record of cells: which cells of each image are kept, and what is remembered of them.

Every image has the same number of rows. The cells that stand for its ground-truth boxes come first, by ascending number,
then those with the highest class score, ties by lower number. What is kept of a cell's classes is as of any other row: for
a softmax `top_k`, for sigmoids the K largest logits, the largest dropped one and the sum of the dropped probabilities.

Everything runs where the outputs are, and nothing waits for a GPU. Beside the outputs, a score for each cell is held, and
the distributions of the chosen cells.

Shape suffixes: `B` images, `A` cells of the grid, `V` classes, `N` chosen cells of an image, `P` = B * N, `K` kept classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import BernoulliLabels, DetectionLabels, SoftLabels
from softcache.labels.sparsify.assemble import top_k_indices
from softcache.labels.sparsify.bernoulli import top_k_bernoulli
from softcache.labels.sparsify.policies.top_k import top_k
from softcache.labels.sparsify.settings import LabelSettings
from softcache.labels.sparsify.validate import CELL_FAULT

__all__ = ["DenseOutputs", "cell_faults", "choose_cells", "sparsify_cells"]


@dataclass(frozen=True, eq=False)
class DenseOutputs:
    """The outputs of a detector at every cell of some images.

    Attributes:
        logits: [B, A, V] float.
        columns: [B, A, ...] float, the head's other outputs by the names of `DetectionLabels.columns`.
        truth: of each image its ground-truth cells [M] int64, on any device; M may be 0, and a cell may come twice.
    """

    logits: Tensor
    columns: Mapping[str, Tensor]
    truth: Sequence[Tensor]


def choose_cells(
    logits_BAV: Tensor, truth: Sequence[Tensor], top: int, *, background: bool = False
) -> Tensor:
    """Which cells get a row: those of the ground truth, ascending, then the best by highest class score.

    Args:
        logits_BAV: of sigmoids; or of a softmax, with `background`.
        truth: of each image its ground-truth cells [M].
        top: N, at most A.
        background: class 0 is a softmax's background. The score is then the probability of the likeliest other class; else
            it is the largest logit.

    Returns:
        [B, N] int64 on the logits' device.

    Raises:
        LabelError: an image has more ground-truth cells than `top` (`position` is its number), or the grid has fewer.

    Example:
        >>> logits = torch.tensor([[[0.0], [3.0], [2.0], [3.0]]])
        >>> choose_cells(logits, [torch.tensor([2])], 3).tolist()
        [[2, 1, 3]]
    """
    num_cells = logits_BAV.shape[1]
    if not 1 <= top <= num_cells:
        raise LabelError(
            f"labels.positions.top: expected 1 to {num_cells}, the cells of the teacher's grid; found {top}; lower it"
        )
    scores_BAV = logits_BAV.float().log_softmax(-1)[..., 1:] if background else logits_BAV.float()
    scores_BA = scores_BAV.amax(-1)
    # A NaN would have no order; its image is refused by `cell_faults`, so that any order will do.
    scores_BA = torch.where(scores_BA.isnan(), -torch.inf, scores_BA).clamp(max=torch.finfo().max)
    for image, cells in enumerate(truth):
        # Only where there are too many of them is looked whether some come twice: that waits for a GPU.
        if len(cells) > top and (found := len(cells.unique())) > top:
            raise LabelError(
                f"{found} ground-truth cells, at most labels.positions.top = {top} rows; raise it to {found} or more",
                position=image,
            )
        scores_BA[image, cells.to(scores_BA.device, torch.int64, non_blocking=True)] = torch.inf
    return top_k_indices(scores_BA, top)


def sparsify_cells(
    outputs: DenseOutputs,
    settings: LabelSettings,
    *,
    distribution: Literal["bernoulli", "categorical"],
) -> DetectionLabels:
    """Makes the record of the chosen cells, image by image.

    Args:
        outputs: of all cells; faulty ones (`cell_faults`) give a record that means nothing.
        settings: `[labels]` with policy "top_k" or "dense", and `positions.top`.
        distribution: "bernoulli" of sigmoids; "categorical" of a softmax whose class 0 is the background.

    Returns:
        A torch record of P = B * N rows on the outputs' device: ids int64, cells int32, the rest float32.

    Raises:
        LabelError: as `choose_cells`; K is above V.
    """
    num_images, _, num_classes = outputs.logits.shape
    k = settings.num_slots(num_classes)
    with torch.no_grad():
        categorical = distribution == "categorical"
        cells_BN = choose_cells(outputs.logits, outputs.truth, settings.positions.top, background=categorical)
        images_B1 = torch.arange(num_images, device=cells_BN.device)[:, None]
        logits_PV = outputs.logits[images_B1, cells_BN].flatten(0, 1).float()
        labels: SoftLabels | BernoulliLabels
        if categorical:
            labels = top_k(logits_PV, k=k, temperatures=settings.temperatures, check=False)
        else:
            labels = top_k_bernoulli(logits_PV, k)
        columns: dict[str, Any] = {
            name: values[images_B1, cells_BN].flatten(0, 1).float()
            for name, values in outputs.columns.items()
        }
        return DetectionLabels(labels, cells_BN.flatten().to(torch.int32), columns)


def cell_faults(outputs: DenseOutputs, *, distribution: Literal["bernoulli", "categorical"]) -> Tensor:
    """What is wrong with each image's outputs, at any of its cells, without waiting for the device.

    Returns:
        [B] uint8, the codes of `describe_fault`: 0 fine; 1 NaN, 2 +inf; 3 all logits of a cell -inf, of a softmax only; 4
        another output that is not finite.
    """
    peak_BA = outputs.logits.amax(-1)
    faults_B = 2 * peak_BA.isposinf().any(1)
    if distribution == "categorical":
        faults_B = torch.where(peak_BA.isneginf().any(1), 3, faults_B)
    faults_B = torch.where(peak_BA.isnan().any(1), 1, faults_B)
    for values in outputs.columns.values():
        wrong_B = ~values.isfinite().flatten(1).all(1)
        faults_B = torch.where(wrong_B & (faults_B == 0), CELL_FAULT, faults_B)
    return faults_B.to(torch.uint8)
