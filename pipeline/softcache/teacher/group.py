"""A teacher that is cut over the processes of one launch: the first one labels, the others run their share of its passes.

    torchrun --nproc-per-node 4 -m softcache teacher-logits --config run.toml        # teacher.engine.tp_plan = "auto"

Only the first process reads batches, applies the head, claims units and writes. What the model is to run goes to the
others as a header of four numbers (what, rows, tokens, whether there are documents) and the tokens. So a unit has one
writer, and several launches share a cache as several processes do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from softcache.errors import ConfigError, LostProcessError, RunError
from softcache.runtime.distributed import num_ranks, rank, translate_errors

__all__ = ["TeacherGroup", "join_teacher_group"]

STOP, FAIL, HIDDEN, PLAIN = range(4)
IDLE_TIMEOUT = timedelta(days=7)
"""How long the others wait for a batch: the first process may wait for units that another launch labels."""


def join_teacher_group(described: dict[str, Any], device: torch.device) -> tuple[TeacherGroup, torch.device]:
    """Returns the group of this launch's processes, and the device of this one.

    Args:
        described: what all processes have to load.

    Raises:
        ConfigError: there is one process.
        RunError: the first process is to load something else.
    """
    if num_ranks() == 1:
        raise ConfigError(
            "teacher.engine.tp_plan: cuts the teacher over the processes of a launch; found one process; start it by "
            '"torchrun --nproc-per-node N -m softcache ...", or use teacher.engine.device_map, which needs one process'
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=IDLE_TIMEOUT)
    first = [described]
    dist.broadcast_object_list(first, device=device)
    differing = [key for key in described if first[0].get(key) != described[key]]
    if differing:
        found = "; ".join(f"{key}: {first[0].get(key)!r}; {described[key]!r}" for key in differing)
        raise RunError(
            f"process {rank()} of {num_ranks()}: the teacher differs from that of process 0 (there; here): {found}; give "
            "all processes the same config and model"
        )
    return TeacherGroup(device), device


class TeacherGroup:
    """The exchange between the processes of a teacher that is cut.

    Attributes:
        is_first: whether this is the process that labels.
        is_led: whether the others follow: passes of the model are allowed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_first, self.is_led = rank() == 0, False

    @contextmanager
    def lead(self) -> Iterator[None]:
        """Has the others run what `share` is given, until the block ends; they end as it does.

        Raises:
            LostProcessError: one of them is gone.
        """
        self.is_led, how = True, FAIL
        try:
            with translate_errors():
                yield
            how = STOP
        finally:
            self.is_led = False
            with suppress(*(() if how == STOP else (RuntimeError,))):  # they may be gone
                self._send([how, 0, 0, 0])

    def share(self, what: int, tokens_BL: torch.Tensor, segments_BL: torch.Tensor | None) -> None:
        """Has the others run a pass that this process runs next.

        Raises:
            ConfigError: they do not follow, because this is no capture.
        """
        if not self.is_led:
            raise ConfigError(
                "teacher.engine.tp_plan: a teacher that is cut over processes labels a cache (softcache teacher-logits); "
                "found another use of it; train from that cache, or use teacher.engine.device_map"
            )
        self._send([what, *tokens_BL.shape, int(segments_BL is not None)])
        for tensor in (tokens_BL, segments_BL):
            if tensor is not None:
                dist.broadcast(tensor.to(self._device, torch.int64).contiguous(), 0)

    def _send(self, header: list[int]) -> None:
        dist.broadcast(torch.tensor(header, dtype=torch.int64, device=self._device), 0)

    def passes(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Yields what the first process shares: what, tokens [B, L], documents [B, L] or None; until it has ended.

        Raises:
            LostProcessError: it has failed or is gone; its message is the one that counts.
        """
        failed = LostProcessError(
            f"process {rank()} of {num_ranks()}: the process that labels has failed; the same command goes on"
        )
        while True:
            try:
                header = torch.zeros(4, dtype=torch.int64, device=self._device)
                dist.broadcast(header, 0)
                what, rows, length, has_segments = header.tolist()
                if what in (STOP, FAIL):
                    break
                tensors: list[torch.Tensor | None] = [None, None]
                for number in range(1 + has_segments):
                    shared = torch.empty((rows, length), dtype=torch.int64, device=self._device)
                    dist.broadcast(shared, 0)
                    tensors[number] = shared
            except RuntimeError as error:
                raise failed from error
            assert tensors[0] is not None
            yield what, tensors[0], tensors[1]
        if what == FAIL:
            raise failed
