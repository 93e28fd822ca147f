"""The optimizers of students by name, and the groups of parameters that they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from softcache.errors import ConfigError, MissingExtraError, SoftcacheError
from softcache.runtime.optional import text_library
from softcache.runtime.registry import Registry

__all__ = ["OPTIMIZERS", "build_optimizer", "decay_by_layer", "parameter_groups"]

OPTIMIZERS: Registry[Callable[..., Any]] = Registry(
    "optimizer",
    package="softcache.student.optimizers",
    group="softcache.optimizers",
    error=ConfigError,
    instance_of=Callable,  # type: ignore[arg-type]
)
"""Functions (groups, *, lr, weight_decay, **arguments) that return an optimizer; `torch.optim:NAdam` is one, too."""


@OPTIMIZERS.register("adamw")
def adamw(groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    """AdamW; two float32 states for each weight."""
    return torch.optim.AdamW(groups, **arguments)


@OPTIMIZERS.register("adamw_8bit")
def adamw_8bit(groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    """AdamW with both states in 8 bits, of bitsandbytes."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError(
            f'train.optimizer = "adamw_8bit": it needs the package bitsandbytes ({error}); pip install bitsandbytes'
        ) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **arguments)
    return optimizer


@OPTIMIZERS.register("adafactor")
def adafactor(groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    """Adafactor of transformers with the learning rate of [train]; a matrix has a state for its rows and its columns."""
    # Steps of its own size and relative to a weight's are off, as in transformers' Trainer: [train] has a schedule.
    fixed = {"scale_parameter": False, "relative_step": False}
    found: torch.optim.Optimizer = text_library("transformers.optimization").Adafactor(
        groups, **fixed | arguments
    )
    return found


@OPTIMIZERS.register("lion")
def lion(groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    """Lion of timm: the sign of a running mean, one state for each weight; wants a learning rate 3 to 10 times smaller."""
    try:
        from timm.optim import Lion
    except ImportError as error:
        raise MissingExtraError(
            f"train.optimizer = \"lion\": it needs the package timm ({error}); pip install 'softcache[vision]'"
        ) from error
    return Lion(groups, **arguments)


@OPTIMIZERS.register("lamb")
def lamb(groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    """LAMB of timm: Adam whose step of each tensor is scaled by the tensor's norm; for large batches."""
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise MissingExtraError(
            f"train.optimizer = \"lamb\": it needs the package timm ({error}); pip install 'softcache[vision]'"
        ) from error
    return Lamb(groups, **arguments)


@OPTIMIZERS.register("sgd")
def sgd(groups: list[dict[str, Any]], *, momentum: float = 0.9, **arguments: Any) -> torch.optim.Optimizer:
    """Stochastic gradient descent with a momentum of 0.9."""
    return torch.optim.SGD(groups, momentum=momentum, **arguments)


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    exempt: bool,
    layer_decay: float | None = None,
    arguments: dict[str, Any],
) -> torch.optim.Optimizer:
    """Returns the optimizer of that name for the parameters of a model that need a gradient.

    Args:
        exempt: as of `parameter_groups`.
        layer_decay: as of `decay_by_layer`.
        arguments: what it is called with besides `lr` and `weight_decay`.

    Raises:
        ConfigError: there is none of that name, it refuses its arguments, or it is no optimizer; or the layers of the
            model are not known.
        MissingExtraError: the package that it comes from is not installed.
    """
    groups = parameter_groups(model, exempt=exempt and weight_decay > 0)
    if layer_decay is not None:
        groups = decay_by_layer(groups, model, lr=lr, layer_decay=layer_decay)
    try:
        optimizer = OPTIMIZERS.get(name)(groups, lr=lr, weight_decay=weight_decay, **arguments)
    except SoftcacheError:
        raise
    except Exception as error:  # a third-party constructor may raise anything
        raise ConfigError(
            f"train.optimizer {name!r}: cannot be built: {type(error).__name__}: {error}; it is called with the parameter "
            f"groups, lr, weight_decay and train.optimizer_args (found {arguments}); check those"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"train.optimizer {name!r}: expected a function that returns a torch.optim.Optimizer; found "
            f"{type(optimizer).__name__}"
        )
    return optimizer


def parameter_groups(model: nn.Module, *, exempt: bool) -> list[dict[str, Any]]:
    """Returns the parameters that need a gradient, in groups as optimizers take them.

    Args:
        exempt: whether norms, biases and embeddings (a head that is tied to them included) are a second group, without
            weight decay; so is a parameter that its model marks by `_no_weight_decay`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not exempt:
        return [{"params": trained}]
    free = {id(parameter) for parameter in _exempt_parameters(model)}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if id(parameter) not in free]},
        {"params": [parameter for parameter in trained if id(parameter) in free], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decay_by_layer(
    groups: list[dict[str, Any]], model: nn.Module, *, lr: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Returns groups in which the learning rate of layer l of L is lr * layer_decay^(L - l); the head is layer L.

    Raises:
        ConfigError: the model has no `group_matcher`, by which timm's models name their layers.

    References:
        Bao et al. 2021, arXiv 2106.08254.
    """
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"train.layer_decay: the layers of {type(model).__name__} are not known; expected a model of timm (with "
            "group_matcher); drop it"
        )
    from timm.models import group_parameters

    layer_of = group_parameters(model, matcher(coarse=False), reverse=True)
    last = max(layer_of.values())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    split: dict[tuple[int, int], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            layer = layer_of[names[id(parameter)]]
            found = split.setdefault(
                (number, layer), group | {"params": [], "lr": lr * layer_decay ** (last - layer)}
            )
            found["params"].append(parameter)
    return list(split.values())


def _exempt_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # A vector is a bias or the scale of a norm, whatever class the norm is of.
            if (
                isinstance(module, nn.Embedding)
                or parameter.ndim < 2
                or getattr(parameter, "_no_weight_decay", False)
            ):
                yield parameter
