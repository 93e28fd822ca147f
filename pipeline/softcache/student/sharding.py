"""A student cut over the processes of a run (`train.parallel = "fsdp"`), by torch's `fully_shard` (FSDP2).

Each process holds a share of each weight, gradient and state of the optimizer, and gathers one block at a time, when
the block runs. What is gathered is what one process would have: the loss through the head sees the whole head, tied or not.

    build        the whole model, on as many processes of a machine at once as `build_at_once` allows, then cut
    collectives  every process runs equally many passes: of pieces of a batch, and of batches of an evaluation
    checkpoint   torch.distributed.checkpoint: each process writes its share; any number of processes reads it
    weights      gathered one tensor at a time into the memory of the first process
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from softcache.errors import ConfigError
from softcache.models.weights import trained_state
from softcache.runtime.distributed import check_same, max_over_ranks
from softcache.student.optimizers import build_optimizer
from softcache.student.settings import FsdpSettings, TrainSettings
from softcache.student.tasks import Task

__all__ = [
    "build_sharded",
    "check_sharded_optimizer",
    "find_blocks",
    "gather_state",
    "load_shards",
    "one_process_group",
    "save_shards",
]

SHARDS = "shards"
OPTIMIZER_CHECK_STEPS = 3
OPTIMIZER_TOLERANCE = 1e-4
"""Of weights of size 1 after so many steps of a learning rate of 0.1: what another order of summation may do."""


@contextmanager
def one_process_group(accelerator: Accelerator) -> Iterator[None]:
    """Gives a run of one process a process group of its own, which FSDP and its checkpoints ask for."""
    if dist.is_initialized():
        yield
        return
    backend = "gloo" if accelerator.device.type == "cpu" else f"cpu:gloo,{accelerator.device.type}:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_sharded(task: Task, settings: TrainSettings, accelerator: Accelerator) -> nn.Module:
    """Returns the student of a task, cut over all processes, on their devices.

    Raises:
        ConfigError: the task has no student that can be cut, or [train.fsdp] names blocks that it lacks.
        RunError: the first process has another [train.fsdp].
    """
    methods = getattr(task, "sharded_methods", None)
    if methods is None:
        raise ConfigError(
            f'train.parallel = "fsdp": {type(task).__name__} trains no student that can be cut over processes; expected a '
            'causal language model (source.modality = "text"); use train.parallel = "ddp"'
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    check_sharded_optimizer(settings, mesh)
    how = settings.fsdp or FsdpSettings()
    check_same("[train.fsdp]", how.model_dump())  # which no identity of a run covers
    turn, num_turns = _turns(accelerator, how.build_at_once)
    model: nn.Module | None = None
    for now in range(num_turns):
        if now == turn:
            model = task.build()
            if (even := getattr(model, "run_even_passes", None)) is not None:
                even(partial(max_over_ranks, device=accelerator.device))
            model = _shard(model, settings, how, mesh, methods)
        accelerator.wait_for_everyone()
    assert model is not None
    return model


def _turns(accelerator: Accelerator, at_once: int | None) -> tuple[int, int]:
    """Returns when this process builds its model, and how many turns there are on all machines."""
    if at_once is None:
        return 0, 1
    turn = accelerator.local_process_index // at_once
    turns = accelerator.gather(torch.tensor([turn], device=accelerator.device))
    return turn, int(turns.max()) + 1


def _shard(
    model: nn.Module, settings: TrainSettings, how: FsdpSettings, mesh: DeviceMesh, methods: tuple[str, ...]
) -> nn.Module:
    # Weights and what the optimizer holds stay in their dtype; gathered copies are in half precision, sums are not.
    half = torch.bfloat16 if settings.precision == "bf16" else None
    policy = {"param_dtype": half, "reduce_dtype": torch.float32}
    for block in find_blocks(model, how.blocks):
        fully_shard(
            block,
            mp_policy=MixedPrecisionPolicy(**policy),  # type: ignore[arg-type]
            reshard_after_forward=how.reshard_after_forward,
            mesh=mesh,
        )
    # Embeddings, last norm and head: the loss in the forward pass needs them last, and the backward pass first.
    whole = MixedPrecisionPolicy(**policy, cast_forward_inputs=False)  # type: ignore[arg-type]
    fully_shard(model, mp_policy=whole, reshard_after_forward=False, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(model, method)
    assert isinstance(model, FSDPModule)
    if mesh.device_type == "cpu":
        model.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    return model


def find_blocks(model: nn.Module, names: tuple[str, ...] = ()) -> list[nn.Module]:
    """Returns the modules that are gathered one at a time: those of the class names, none inside another.

    Args:
        names: of classes; empty: those that transformers must not split over devices (`_no_split_modules`), or the members
            of the longest list of modules of one class.

    Raises:
        ConfigError: the model has no module of a class, or no list.
    """
    found = Counter(type(part).__name__ for part in model.modules())
    if missing := [name for name in names if name not in found]:
        lists = sorted({type(part).__name__ for several in _lists(model) for part in several})
        raise ConfigError(
            f"train.fsdp.blocks: the student has no module of class {', '.join(missing)}; found lists of "
            f"{', '.join(lists) or 'nothing'}; name classes of those, or leave blocks out"
        )
    classes = set(names)
    for part in model.modules() if not names else ():
        classes |= set(getattr(part, "_no_split_modules", None) or ())
    if not classes & set(found):
        longest = max(_lists(model), key=len, default=None)
        if longest is None:
            raise ConfigError(
                "train.fsdp: the student has no list of modules of one class; "
                "name classes in train.fsdp.blocks"
            )
        classes = {type(longest[0]).__name__}
    return [part for part in _outermost(model, classes) if any(True for _ in part.parameters())]


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
    return [several for several in lists if len({type(part) for part in several}) == 1]


def _outermost(module: nn.Module, classes: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in classes:
            yield child
        else:
            yield from _outermost(child, classes)


def check_sharded_optimizer(settings: TrainSettings, mesh: DeviceMesh) -> None:
    """Compares a few steps of the optimizer on a small matrix and a vector, cut and whole.

    Raises:
        ConfigError: it fails on weights that are cut, or does something else than on whole ones.
    """

    def step(cut: bool) -> list[torch.Tensor]:
        model = nn.Linear(3, 2 * mesh.size(), device="meta").to_empty(device=mesh.device_type)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(_wave(parameter, 0))
        if cut:
            fully_shard(model, mesh=mesh)
        optimizer = build_optimizer(
            *(settings.optimizer, model),
            lr=0.1,
            weight_decay=settings.weight_decay,
            exempt=False,
            arguments=settings.optimizer_args,
        )
        for number in range(OPTIMIZER_CHECK_STEPS):
            for parameter in model.parameters():
                gradient = _wave(parameter, number + 1)
                parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)]) if cut else gradient
            optimizer.step()
        return [_whole(parameter.detach()) for parameter in model.parameters()]

    name = f'train.optimizer = "{settings.optimizer}"'
    advice = 'use "adamw", "lion" or "sgd", or train.parallel = "ddp"'
    whole = step(False)
    try:
        found = step(True)
    except Exception as error:  # an optimizer's own code may raise anything
        raise ConfigError(
            f'{name}: cannot step on weights that are cut over processes (train.parallel = "fsdp"): '
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; {advice}"
        ) from error
    worst = max(float((one - two).abs().max()) for one, two in zip(whole, found, strict=True))
    if not worst <= OPTIMIZER_TOLERANCE:
        raise ConfigError(
            f'{name}: on weights that are cut over processes (train.parallel = "fsdp") its steps differ by {worst:.1e} from '
            f"those on whole ones; expected at most {OPTIMIZER_TOLERANCE:.0e}; {advice}"
        )


def _wave(like: torch.Tensor, number: int) -> torch.Tensor:
    """Returns fixed numbers of about 1 in the shape of a tensor; other ones for each `number`."""
    index = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return (index * (1.7 + number) + number).sin().view(like.shape)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(state: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Returns whole tensors on the CPU where `keep` is true, else nothing; all processes call this, one keeps.

    On every device lies one whole tensor at a time.
    """
    gathered: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        tensor = _whole(value.detach())
        if keep:
            gathered[name] = tensor.cpu()
    return gathered


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes model and optimizer into FOLDER/shards, each process its share; of adapters, what is trained."""
    import torch.distributed.checkpoint as dcp

    dcp.save(_state(model, optimizer), checkpoint_id=str(folder / SHARDS))


def load_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Reads what `save_shards` wrote, on any number of processes, into a model and an optimizer of the same run."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=str(folder / SHARDS))  # the model's tensors are written in place
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    # Tied weights are stored once, under their first name.
    again = (
        dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    )
    weights = {name: value for name, value in trained_state(model).items() if name not in again}
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}
