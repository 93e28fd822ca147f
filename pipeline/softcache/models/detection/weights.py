"""Weights of a detector from a file: softcache's own, torchvision's published ones, or of torchvision's training script."""

from __future__ import annotations

from pathlib import Path

import torch

from softcache.errors import SpecError
from softcache.models.detection.detector import Detector, num_outputs
from softcache.models.weight_files import PREFIXES, read_state

__all__ = ["head_outputs", "load_detector_weights", "read_detector_state"]

HEAD = "head.classification_head."


def head_outputs(detector: Detector, state: dict[str, torch.Tensor]) -> int:
    """Returns how many outputs the head has whose weights a state dict of `read_detector_state` holds.

    Args:
        detector: of the same architecture, with a head of any number of outputs.
    """
    own = num_outputs(detector.net)
    for name, value in detector.net.state_dict().items():
        # The last layers' rows are anchors times classes; all else of the head is as wide in both.
        if name.startswith(HEAD) and name in state and value.ndim and len(state[name]) != len(value):
            return own * len(state[name]) // len(value)
    return own


def read_detector_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the state dict of a file of weights by torchvision's names; see `softcache.models.weight_files.read_state`."""
    state = read_state(path)
    while prefix := next(
        (p for p in (*PREFIXES, "net.") if state and all(name.startswith(p) for name in state)), ""
    ):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_detector_weights(detector: Detector, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Loads a state dict into a detector, strictly, by torchvision's own rules for older names.

    Args:
        state: of `read_detector_state`.
        path: where it is from, for messages.

    Raises:
        SpecError: it does not fit: other names, or other sizes.
    """
    what = f"weights {path}"
    if (found := head_outputs(detector, state)) != (own := num_outputs(detector.net)):
        classes = own - detector.background
        raise SpecError(
            f"{what}: expected a head of {own} outputs, of {classes} classes"
            f"{' and a background' * detector.background}; found {found}; set teacher.class_map to which of them are "
            "the source's classes (\"auto\": by name, of torchvision's published weights), or give weights with such a head"
        )
    try:
        problems = detector.net.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes differ
        raise SpecError(f"{what}: cannot be loaded: {str(error).splitlines()[-1].strip()}") from error
    if problems.missing_keys or problems.unexpected_keys:
        raise SpecError(
            f"{what}: do not fit the model; missing {problems.missing_keys[:5]}, unexpected "
            f"{problems.unexpected_keys[:5]}; check teacher.model and its arguments"
        )
