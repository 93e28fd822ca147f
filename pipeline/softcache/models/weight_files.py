"""Weights from files: state dicts, and the checkpoints that training scripts write, read safely."""

from __future__ import annotations

import argparse
import pathlib
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from softcache.errors import SpecError
from softcache.models.weights import frozen_names
from softcache.runtime.logging import log_info

__all__ = ["checkpoint_arguments", "load_weights", "read_state"]


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict into `model`, strictly.

    Of a model with adapters, the file holds what is trained.

    Args:
        path: as of `read_state`.

    Raises:
        SpecError: the file is missing, unreadable, or does not fit (the names that differ are listed).
    """
    state = read_state(path)
    frozen = frozen_names(model)
    state = _renamed(state, model, frozen, path)
    _check_shapes(state, model, path)
    try:
        problems = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes differ
        raise SpecError(f"weights {path}: cannot be loaded: {type(error).__name__}: {error}") from error
    missing = [name for name in problems.missing_keys if name not in frozen]
    if missing or problems.unexpected_keys:
        raise SpecError(
            f"weights {path}: do not fit the model; missing {missing[:5]}, "
            f"unexpected {problems.unexpected_keys[:5]}; check teacher.model and its arguments"
        )


def _check_shapes(state: dict[str, torch.Tensor], model: nn.Module, path: str | Path) -> None:
    """Raises SpecError where a tensor has another shape than the model's of that name."""
    shapes = {
        name: (list(state[name].shape), list(value.shape))
        for name, value in model.state_dict().items()
        if name in state and isinstance(value, torch.Tensor) and not is_lazy(value)
    }
    wrong = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if wrong:
        name, (found, expected) = next(iter(wrong.items()))
        way_out = (
            "a head of other classes than the source needs teacher.class_map (which outputs are its classes), else check "
            "teacher.model and its arguments"
        )
        if len(found) == 4 and (found[1], expected[1]) == (3, 1):
            way_out = (
                "a timm model that took gray images in three channels needs in_chans=3 among its arguments"
            )
        raise SpecError(
            f"weights {path}: {len(wrong)} of {len(shapes)} tensors have another shape than the model's, such as {name}: "
            f"{found} in the file, {expected} in the model; {way_out}"
        )


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the state dict of a file of weights, or of a checkpoint of a training script.

    `.safetensors` is read by safetensors, anything else by `torch.load(weights_only=True)`, which refuses to run code;
    besides tensors it allows what training scripts put next to them: arguments, paths, NumPy's scalars. A checkpoint's
    state dict is its entry for averaged weights (EMA), where there is one, and else the trained ones; `FILE#ENTRY` is
    another.

    Raises:
        SpecError: the file is missing, unreadable, or has no such entry.
    """
    file, entry = _place(path)
    if not file.is_file():
        raise SpecError(
            f"weights {path}: no such file; run `softcache train-teacher`, or point teacher.weights at one"
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = _load(file)
    except Exception as error:
        raise SpecError(
            f"weights {path}: cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}; nothing in it was "
            "run; expected safetensors, a state dict, or a checkpoint of tensors and plain values"
        ) from error
    if not isinstance(state, dict):
        raise SpecError(f"weights {path}: a {type(state).__name__}; expected a state dict, not a whole model")
    entries = _entries(state)
    if entry and entry not in entries:
        raise SpecError(
            f"weights {path}: no state dict {entry!r} in {file}; it has {', '.join(entries) or 'none'}"
        )
    known = [*(key for key in entries if EMA.search(key)), *(key for key in ENTRIES if key in entries)]
    if (
        not known
        and len(entries) == 1
        and not any(isinstance(value, torch.Tensor) for value in state.values())
    ):
        known = list(entries)
    chosen = entry or next(iter(known), "")
    if not chosen and entries:
        raise SpecError(
            f"weights {path}: holds the state dicts {', '.join(entries)}; name one as {file}#{next(iter(entries))}"
        )
    if not chosen:
        return state
    if not entry and EMA.search(chosen):
        others = ", ".join(f"{file}#{key}" for key in known[1:])
        log_info(
            f"weights {file}: the averaged ones, {chosen}, are taken"
            + (f"; others are {others}" if others else "")
        )
    return entries[chosen]


def _entries(state: dict[Any, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the state dicts of a checkpoint by name; of one inside of an entry, ENTRY.NAME."""
    found = {str(key): value for key, value in state.items() if isinstance(value, dict)}
    inner = {
        f"{key}.{name}": value
        for key, part in found.items()
        for name, value in part.items()
        if isinstance(value, dict)
    }
    return {key: value for key, value in (found | inner).items() if _is_state(value)}


def checkpoint_arguments(path: str | Path) -> dict[str, Any]:
    """Returns the arguments that a training script wrote into its checkpoint; empty where there are none."""
    file, _ = _place(path)
    if file.suffix == ".safetensors" or not file.is_file():
        return {}
    try:
        found = _load(file, mmap=zipfile.is_zipfile(file))
    except Exception:  # as `read_state` will say
        return {}
    arguments = found.get("args") if isinstance(found, dict) else None
    return dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}


def _place(path: str | Path) -> tuple[Path, str]:
    """Returns a file, and which entry of it is asked for."""
    place, _, entry = str(path).partition("#") if not Path(path).is_file() else (str(path), "", "")
    return Path(place), entry


def _load(file: Path, *, mmap: bool = False) -> Any:
    with torch.serialization.safe_globals(ALLOWED):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


EMA = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
"""What names of entries with averaged weights have in them: state_dict_ema, ema.module."""
ENTRIES = ("model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and Lightning's modules put in front of names."""
OUTER_PREFIXES = ("net.", "1.")
"""What softcache's own wrappers do: of a torchvision detector, and of a torchvision classifier of grey images."""
SCALAR = np.float64(0).__reduce__()[0]
ALLOWED: list[Any] = [
    *(argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.dtype),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
    *(SCALAR, (SCALAR, "numpy.core.multiarray.scalar")),  # as NumPy 1 calls it
]
"""What a pickle of weights may hold besides tensors: values that do nothing."""


def _is_state(value: dict[Any, Any]) -> bool:
    return bool(value) and all(
        isinstance(one, torch.Tensor) and isinstance(key, str) for key, one in value.items()
    )


def _without_auxiliary_head(
    state: dict[str, torch.Tensor], expected: set[str], path: str | Path
) -> dict[str, torch.Tensor]:
    """Returns a state dict without the head that torchvision trains segmentation with and no image goes through later,
    where the model has none."""
    auxiliary = {name for name in state if "aux_classifier" in name.split(".")}
    if not auxiliary or any("aux_classifier" in name.split(".") for name in expected):
        return state
    log_info(f"weights {path}: the auxiliary head of training, aux_classifier, is left out")
    return {name: value for name, value in state.items() if name not in auxiliary}


def _renamed(
    state: dict[str, torch.Tensor], model: nn.Module, frozen: set[str], path: str | Path
) -> dict[str, torch.Tensor]:
    """Returns a state dict with the model's own names, where they differ by what is in front of all of them; logged.

    `n_averaged`, torch's count of averages, goes.
    """
    expected = model.state_dict().keys() - frozen
    found = {name: value for name, value in state.items() if name != "n_averaged"}
    found = _without_auxiliary_head(found, expected, path)
    if len(fronts := _prefixes(found, expected)) > 1:
        raise SpecError(
            f"weights {path}: the model is in it {len(fronts)} times, as {', '.join(fronts)}; write a file of one"
        )
    if fronts:
        (front,) = fronts
        others = [name for name in found if not name.startswith(front)]
        log_info(
            f"weights {path}: names are without their prefix {front!r}, as the model has them"
            + (f"; {len(others)} without it are left out, such as {others[0]}" if others else "")
        )
        return {name: found[front + name] for name in expected}
    for front in OUTER_PREFIXES:
        if {front + name for name in found} == expected:
            log_info(f"weights {path}: names are given the prefix {front!r}, as the model has them")
            return {front + name: value for name, value in found.items()}
    return found if found.keys() == expected else state  # the names that differ are those of the file


def _prefixes(found: Collection[str], expected: Collection[str]) -> list[str]:
    """Returns what may be taken from the front of names to get all names of a model; empty where nothing has to."""
    longest = max(expected, key=len, default="")
    fronts = (
        {name.removesuffix(longest) for name in found if name.endswith("." + longest)} if longest else set()
    )
    return sorted(
        front
        for front in fronts
        if {name.removeprefix(front) for name in found if name.startswith(front)} == set(expected)
    )
