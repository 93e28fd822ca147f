"""Mixup and CutMix as a pure function of (seed, sample key, view): parameters first, then pixels and ground truth.

A mixed view is made of two images, each as the same view number shows it by itself (its own crop, flip, colors, erased
rectangle, drawn by its own key) and never mixed again. Eight numbers follow the 64 of the view in its stream:

    64 whether to mix    65 CutMix or mixup    66 share    67 second sample    68, 69 center of the box    70, 71 spare

    mixup    s * first + (1 - s) * second, rounded to the nearest grey level (halves up)
    CutMix   a box of the second image in the first one; s is what is left of the first

The second sample is uniform over the others of the split. Parameters, box and targets are those of timm's `Mixup`
(`mode="elem"`, `correct_lam=True`). The share of mixup, and of CutMix before its box is cut at the image's edges, is drawn
from Beta(alpha, alpha) by its inverse distribution function, and is a whole number of 1/65536. The thresholds between these
numbers are made with additions, products, quotients and square roots alone, which every machine rounds alike, so that no
`pow` or `lgamma` of a C library decides a pixel.

References:
    Zhang et al. 2018, mixup, arXiv 1710.09412, eq. (1). Yun et al. 2019, CutMix, arXiv 1905.04899, eqs. (1) and (2).

Shape suffixes: `B` samples, `C` channels, `H` height, `W` width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from softcache.data.transforms.settings import ViewSettings
from softcache.errors import SpecError

__all__ = ["FIRST_SLOT", "NUM_SLOTS", "SHARES", "Mixes", "beta_shares", "draw_mixes", "mix_images"]

FIRST_SLOT, NUM_SLOTS = 64, 8
"""The numbers of a view's stream that decide how it is mixed."""
SHARES = 2**16
"""A share is a whole number of 1 / SHARES."""


@dataclass(frozen=True, eq=False)
class Mixes:
    """How the samples of a batch are mixed.

    Attributes:
        rows: [M] int64, the rows of the batch that are mixed.
        seconds: [M] int64, the sample that is mixed into each.
        shares: [M] int64, of the first image, in 1 / SHARES; of CutMix before the box is cut at the edges.
        cuts: [M] bool, CutMix.
        centers: [M, 2] float64, vertical and horizontal place of the box's center in the image, in [0, 1).
    """

    rows: np.ndarray
    seconds: np.ndarray
    shares: np.ndarray
    cuts: np.ndarray
    centers: np.ndarray

    def box(self, number: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the (top, left, bottom, right) of the box of mix `number` in an image, edges exclusive."""
        side = math.sqrt(1.0 - int(self.shares[number]) / SHARES)
        spans = []
        for length, center in zip((height, width), self.centers[number].tolist(), strict=True):
            cut, middle = int(length * side), int(center * length)
            spans.append((max(middle - cut // 2, 0), min(middle + (cut + 1) // 2, length)))
        (top, bottom), (left, right) = spans
        return top, left, bottom, right


def draw_mixes(settings: ViewSettings, u_BS: np.ndarray, samples: np.ndarray, num_samples: int) -> Mixes:
    """Returns how samples are mixed.

    Args:
        u_BS: float64 [B, 8] in [0, 1), of slots 64 to 71.
        samples: [B] int64, their numbers.
        num_samples: of the split; with a single one nothing is mixed.
    """
    rows = np.flatnonzero((u_BS[:, 0] < settings.mix_probability) & (num_samples > 1))
    u_MS, firsts = u_BS[rows], samples[rows]
    cuts = np.full(len(rows), settings.cutmix_alpha > 0)
    if settings.mixup_alpha and settings.cutmix_alpha:
        cuts = u_MS[:, 1] < settings.mix_switch
    shares = np.empty(len(rows), np.int64)
    for chosen, alpha in ((cuts, settings.cutmix_alpha), (~cuts, settings.mixup_alpha)):
        if chosen.any():
            shares[chosen] = beta_shares(alpha, u_MS[chosen, 2])
    seconds = (u_MS[:, 3] * (num_samples - 1)).astype(np.int64)
    seconds += seconds >= firsts  # one of the others
    return Mixes(rows, seconds, shares, cuts, u_MS[:, 4:6])


def beta_shares(alpha: float, u: np.ndarray) -> np.ndarray:
    """Returns the quantiles of Beta(alpha, alpha) at `u` in [0, 1), rounded to the nearest 1 / SHARES, int64."""
    lower = np.searchsorted(_thresholds(alpha), np.minimum(u, 1.0 - u), side="right")
    return np.where(u > 0.5, SHARES - lower, lower)


@cache
def _thresholds(alpha: float) -> np.ndarray:
    """P(share < (j + 1/2) / SHARES) of Beta(alpha, alpha) for j below SHARES / 2.

    The integral of x^(alpha-1) (1-x)^(alpha-1) over a cell is the difference of x^alpha / alpha times the other factor in
    the middle of the cell, which is smooth below 1/2. Wrong by less than 2e-8.
    """
    edges = np.concatenate([[0.0], np.arange(1, SHARES, 2) / (2.0 * SHARES), [0.5]])
    middles = (edges[1:] + edges[:-1]) / 2
    middles[0] = edges[1] * alpha / (alpha + 1)  # where the weight x^(alpha-1) of the first cell has its mean
    above = 1.0 - middles
    steps = np.maximum(np.diff(_power(edges, alpha)), 0.0) * (_power(above, alpha) / above)
    sums = np.cumsum(steps)
    return sums[:-1] / (2 * sums[-1])


def _power(x: np.ndarray, exponent: float) -> np.ndarray:
    """x to a power of at least 0, by products and square roots."""
    whole, fraction = int(exponent), exponent - int(exponent)
    out, root = np.ones_like(x), x
    for _ in range(whole):
        out = out * x
    while fraction > 0:
        root, fraction = np.sqrt(root), 2 * fraction
        if fraction >= 1:
            out, fraction = out * root, fraction - 1
    return out


def mix_images(
    images: Sequence[torch.Tensor] | torch.Tensor,
    seconds: Sequence[torch.Tensor] | torch.Tensor,
    mixes: Mixes,
    keys: Sequence[str],
) -> tuple[Any, np.ndarray]:
    """Returns the images of a batch with those rows mixed that are to be, and the share [B] float64 of each first image.

    Args:
        images: the batch's views, one tensor [B, C, H, W] or a list of B images; never written to.
        seconds: M views, those that are mixed in.
        keys: [B] of the batch, for messages.

    Raises:
        SpecError: two images that are to be mixed differ in shape or dtype, or are neither uint8 nor floating point.
    """
    firsts, others = _arrays(images), _arrays(seconds)
    out: Any = firsts.copy() if isinstance(firsts, np.ndarray) else list(firsts)
    kept_B = np.ones(len(images))
    for number, row in enumerate(mixes.rows.tolist()):
        first, second = firsts[row], others[number]
        if first.shape != second.shape or first.dtype != second.dtype:
            raise SpecError(
                f"views: sample {keys[row]!r} is to be mixed, and its view is {first.dtype} of shape {first.shape}, the "
                f"other one {second.dtype} of shape {second.shape}; expected the same; set views.size"
            )
        if mixes.cuts[number]:
            height, width = first.shape[1:]
            top, left, bottom, right = mixes.box(number, height, width)
            if isinstance(out, list):
                out[row] = first.copy()
            out[row][:, top:bottom, left:right] = second[:, top:bottom, left:right]
            kept_B[row] = 1.0 - (bottom - top) * (right - left) / (height * width)
        else:
            share = int(mixes.shares[number])
            out[row], kept_B[row] = _blended(first, second, share), share / SHARES
    if isinstance(out, list):
        return [torch.from_numpy(image) for image in out], kept_B
    return torch.from_numpy(out), kept_B


def _arrays(images: Sequence[torch.Tensor] | torch.Tensor) -> Sequence[np.ndarray] | np.ndarray:
    return images.numpy() if isinstance(images, torch.Tensor) else [image.numpy() for image in images]


def _blended(first: np.ndarray, second: np.ndarray, share: int) -> np.ndarray:
    if first.dtype == np.uint8:
        from softcache.data.transforms.crop_kernel import blend  # takes numba along

        one, other = (np.ascontiguousarray(image).reshape(-1) for image in (first, second))
        return blend(one, other, share).reshape(first.shape)
    if not np.issubdtype(first.dtype, np.floating):
        raise SpecError(
            f"views: images of {first.dtype} are to be mixed; expected uint8 or floating point; let views.transform return "
            "one of these"
        )
    weight = share / SHARES
    return first * weight + second * (1.0 - weight)
