"""What all rows of a cache of hidden states share: the teacher's head, and the coordinates that states are kept as.

Coordinates are chosen once, when the cache is created, and stored with it: a rerun, another worker and another machine read
them from there, so that rounding of a decomposition makes no difference.

With C the covariance of states and M = W'W - n w w' of the head's weight (w its mean over classes: what is added to all
logits alike changes no distribution; not subtracted under a soft cap), the logits have the variance trace(C M). The R
leading eigenvectors U of M^1/2 C M^1/2 keep most of it: a state h has the coordinates (h - mean) M^1/2 U, and the head of
the coordinates is W M^-1/2 U, with the bias W mean + b.

Shape suffixes: `N` rows, `D` width of a state, `R` coordinates, `V` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from softcache.cache.shared import parse_head
from softcache.data.batch import Dataset as Data
from softcache.errors import LabelError
from softcache.labels import OutputHead
from softcache.labels.sparsify import Hidden, LabelSettings
from softcache.teacher.base import Teacher

__all__ = ["SAMPLED_ROWS", "leading_coordinates", "parsed_head", "sample_states", "shared_objects"]

SAMPLED_ROWS = 8192
"""Rows that coordinates are chosen by; at least four for each number of a state, of samples from all over the source."""
BLOCK_ROWS = 8192


def shared_objects(
    teacher: Teacher, data: Data, labels: LabelSettings, *, batch_size: int
) -> dict[str, bytes]:
    """Returns the objects of a cache by name: the head of hidden states as a safetensors file; none of other labels.

    Raises:
        LabelError: the head, or a hidden state, has numbers that are not finite.
    """
    if not labels.of_states:
        return {}
    from safetensors.torch import save

    assert isinstance(labels, Hidden)
    head = teacher.output_head()
    if labels.components is not None:
        states_ND = sample_states(teacher, data, batch_size=batch_size)
        head = leading_coordinates(states_ND, head, labels.components)
    tensors = {name: getattr(head, name) for name in ("weight", "bias", "mean", "encoder")}
    stored = save({name: x.cpu().contiguous() for name, x in tensors.items() if x is not None})
    parse_head(stored, where=f"teacher {teacher.spec}, head")
    return {"head": stored}


def parsed_head(objects: Mapping[str, bytes], teacher: Teacher, labels: LabelSettings) -> OutputHead | None:
    """Returns the head that `shared_objects` made, on the teacher's device; None where labels need none."""
    if getattr(labels, "components", None) is None:
        return None
    found: dict[str, Any] = {
        name: x.to(teacher.device) for name, x in parse_head(objects["head"], where="head").items()
    }
    return OutputHead(**{"bias": None} | found, logit_scale=1.0, softcap=None)


@torch.inference_mode()
def sample_states(teacher: Teacher, data: Data, *, batch_size: int) -> torch.Tensor:
    """Returns hidden states [N, D] of samples from all over the source, in the order of their numbers."""
    width = teacher.output_head().weight.shape[1]
    wanted = max(SAMPLED_ROWS, 4 * width)
    num_samples = min(len(data), max(1, round(wanted / data.mean_rows)))
    samples = np.unique(np.linspace(0, len(data) - 1, num_samples).astype(np.int64))
    states = []
    for part in np.array_split(samples, -(-len(samples) // batch_size)):
        batch = data.load(part, 0, fingerprints=False)
        states += [states_PD.float() for states_PD in teacher.states(batch)]
    return torch.cat(states)


def leading_coordinates(states_ND: torch.Tensor, head: OutputHead, components: int) -> OutputHead:
    """Returns a head of so many coordinates with their encoder; see the module docstring.

    Args:
        states_ND: that the variance is taken of.
        head: of the whole states.

    Raises:
        LabelError: the head reads fewer directions of a state, as one of few classes does.
    """
    states = states_ND.double()
    mean_D = states.mean(0)
    centered = states - mean_D
    covariance = centered.T @ centered / max(1, len(states))
    width = len(mean_D)
    # Directions that no row shows come last, in the order of what the head makes of them.
    covariance += 1e-6 * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(width).to(covariance)
    metric = _metric(head)
    values, vectors = torch.linalg.eigh(metric)
    kept = values > values[-1] * 1e-12
    if components > (readable := int(kept.sum())):
        raise LabelError(
            f"labels.components: expected at most {readable}, the directions of a hidden state of {width} numbers that a "
            f"head of {len(head.weight)} classes reads; found {components}; lower it, or keep all classes (policy 'dense')"
        )
    root = vectors[:, kept] * values[kept].sqrt()  # [D, D']: metric = root root'
    inverse = vectors[:, kept] / values[kept].sqrt()
    _, axes = torch.linalg.eigh(root.T @ covariance @ root)
    axes = axes.flip(1)[:, :components]
    encoder, decoder = root @ axes, inverse @ axes
    weight = torch.cat([block.double() @ decoder for block in head.weight.split(BLOCK_ROWS)])
    bias = torch.cat([block.double() @ mean_D for block in head.weight.split(BLOCK_ROWS)])
    bias = bias if head.bias is None else bias + head.bias.double()
    return head._replace(
        weight=weight.to(head.weight.dtype),
        bias=bias.float(),
        mean=mean_D.float(),
        encoder=encoder.float(),
    )


def _metric(head: OutputHead) -> torch.Tensor:
    """Returns W'W [D, D] float64 of a head's weight, less its mean over the classes unless there is a soft cap."""
    width = head.weight.shape[1]
    found = torch.zeros(width, width, dtype=torch.float64, device=head.weight.device)
    for block in head.weight.split(BLOCK_ROWS):
        block = block.double()
        found.addmm_(block.T, block)
    if head.softcap is None:
        mean_D = head.weight.double().mean(0)
        found -= len(head.weight) * mean_D[:, None] * mean_D
    return found
