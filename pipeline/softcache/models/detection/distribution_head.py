"""An FCOS head that gives each edge of a box a distribution over distances, not one number.

    distance of an edge = sum_i softmax(bins)_i * i        i = 0 to n, in sides of the cell's anchor

A teacher's distribution shows how sure it is of an edge, which its mean does not: localisation distillation compares them
(`softcache.losses.detection.edge_kl`). Box decoding and the losses of FCOS work on the distances as before; the
distribution focal loss is added to them.

References:
    Li et al. 2020, Generalized Focal Loss, arXiv 2006.04388, section 3.2 (general distribution of boxes) and equation 6.
    Zheng et al. 2022, Localization Distillation for Dense Object Detection, arXiv 2102.12252.

Shape suffixes: `B` images, `A` cells, `N` bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.detection.fcos import FCOSHead, FCOSRegressionHead

__all__ = ["DistributionHead", "distribution_focal_loss", "expected_distances"]

WEIGHT = 0.25
"""Of the distribution focal loss, as in the paper's models."""


class DistributionHead(FCOSHead):
    """FCOS's head with n + 1 logits for each edge; its outputs have "bins" [B, A, 4, N] in addition.

    Attributes:
        bins: n, the largest distance of an edge.
    """

    def __init__(self, channels: int, num_anchors: int, num_classes: int, num_convs: int, bins: int) -> None:
        super().__init__(channels, num_anchors, num_classes, num_convs)
        if bins < 2:
            raise ValueError(
                f"bins = {bins}; expected at least 2, the largest distance in sides of an anchor"
            )
        self.bins = bins
        self.regression_head = _DistributionRegression(channels, num_anchors, num_convs, bins)

    def forward(self, features: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        bins_BA4N, centerness = self.regression_head(features)
        return {
            "cls_logits": self.classification_head(features),
            "bbox_regression": expected_distances(bins_BA4N),
            "bbox_ctrness": centerness,
            "bins": bins_BA4N,
        }

    def compute_loss(
        self,
        targets: list[dict[str, torch.Tensor]],
        head_outputs: dict[str, torch.Tensor],
        anchors: list[torch.Tensor],
        matched_idxs: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        total, count = head_outputs["bins"].sum() * 0, 0
        rows = zip(targets, head_outputs["bins"], anchors, matched_idxs, strict=True)
        for target, bins_A4N, anchors_A4, box_A in rows:
            matched = box_A >= 0
            wanted = self.box_coder.encode(anchors_A4[matched], target["boxes"][box_A[matched]])
            total = total + distribution_focal_loss(bins_A4N[matched], wanted).sum()
            count += int(matched.sum())
        return found | {"distribution": WEIGHT * total / max(1, count)}


class _DistributionRegression(FCOSRegressionHead):
    def __init__(self, channels: int, num_anchors: int, num_convs: int, bins: int) -> None:
        super().__init__(channels, num_anchors, num_convs)
        self._num = bins + 1
        self.bbox_reg = nn.Conv2d(channels, num_anchors * 4 * (bins + 1), 3, padding=1)
        nn.init.normal_(self.bbox_reg.weight, std=0.01)
        nn.init.zeros_(self.bbox_reg.bias)  # type: ignore[arg-type]

    def forward(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        bins: list[torch.Tensor] = []
        centerness: list[torch.Tensor] = []
        for feature in features:
            seen = self.conv(feature)
            for maps, inner, found in (
                (self.bbox_reg(seen), (4, self._num), bins),
                (self.bbox_ctrness(seen), (1,), centerness),
            ):
                found.append(maps.permute(0, 2, 3, 1).reshape(len(maps), -1, *inner))
        return torch.cat(bins, 1), torch.cat(centerness, 1)


def expected_distances(bins: torch.Tensor) -> torch.Tensor:
    """Returns the mean distance of each edge, [..., 4] float32, of logits [..., 4, N]."""
    places = torch.arange(bins.shape[-1], device=bins.device, dtype=torch.float32)
    return (bins.float().softmax(-1) * places).sum(-1)  # no product of matrices, which autocast would round


def distribution_focal_loss(bins_P4N: torch.Tensor, distances_P4: torch.Tensor) -> torch.Tensor:
    """Returns the mean over edges of -((i + 1 - y) log p_i + (y - i) log p_{i + 1}), i = floor(y), [P].

    Args:
        distances_P4: y, of the true edges, cut at 0 and n.
    """
    last = bins_P4N.shape[-1] - 1
    y = distances_P4.clamp(0, last)
    low = y.floor().clamp(max=last - 1).long()
    logits, share = bins_P4N.flatten(0, 1), (y - low).flatten()
    low = low.flatten()
    loss: Any = (1 - share) * cross_entropy(logits, low, reduction="none")
    loss = loss + share * cross_entropy(logits, low + 1, reduction="none")
    return loss.view(-1, 4).mean(1)
