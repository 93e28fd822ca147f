"""What runs a teacher's backbone: an engine, its settings, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, SerializeAsAny, model_validator

from softcache.errors import ConfigError
from softcache.models.language.placement import Placement
from softcache.runtime.registry import Registry, variant
from softcache.settings import Settings

if TYPE_CHECKING:
    import torch

    from softcache.models.language.checkpoint import Checkpoint

__all__ = ["ENGINES", "AnyEngineSettings", "Engine", "EngineSettings", "TransformersSettings"]


class Engine(ABC):
    """A program that runs the backbone of a saved model, in this process or in others.

    `start` may be called again after `stop`. Every method but `head` raises `EngineError` where the program cannot start,
    has failed, or is out of memory.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @abstractmethod
    def start(self) -> None:
        """Loads the model."""

    @abstractmethod
    def hidden_states(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Returns for each row of token ids the hidden states [L, D] of its tokens, after the final norm.

        A row attends to itself alone, from position 0.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ends the program and frees its memory; harmless where it does not run."""

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the head's weight [V, D] and bias [V] or None: here those that the saved model has."""
        return self.checkpoint.head()


class EngineSettings(Settings):
    """`[teacher.engine]`: an engine by name; the settings that it reads are those of a subclass.

    Attributes:
        name: "transformers", "vllm", or `package.module:Name`.
    """

    name: str

    def make(self, checkpoint: Checkpoint, *, context: int, dtype: torch.dtype) -> Engine:
        """Returns the engine of a saved model, not started.

        Args:
            context: the most tokens of a row.
            dtype: in which the backbone runs.

        Raises:
            ConfigError: the settings do not fit the model or its rows.
            MissingExtraError: the engine is not installed.
        """
        raise ConfigError(f"teacher.engine: {self.name!r} defines no `make`, which returns an Engine")

    def identity(self) -> dict[str, Any]:
        """Returns the settings that change labels by more than rounding: those of the teacher's identity."""
        return {}


ENGINES: Registry[type[EngineSettings]] = Registry(
    "engine",
    package="softcache.teacher.engines",
    group="softcache.engines",
    error=ConfigError,
    subclass_of=EngineSettings,
)


@ENGINES.register("transformers")
class TransformersSettings(EngineSettings):
    """No engine: the model is a module of this process, or of each process of a launch.

    A model `hf:` larger than one device: `device_map` ("auto", "balanced", "sequential", or a device for each part) spreads
    it over the devices of this process, the CPU ("cpu") and a disk ("disk", in `offload_folder`), each used up to
    `max_memory` ({"0" = "20GiB", "cpu" = "60GiB"}); `tp_plan = "auto"` cuts its layers over the processes of a torchrun.
    """

    name: Literal["transformers"] = "transformers"
    device_map: str | dict[str, int | str] | None = None
    max_memory: dict[str, str] | None = None
    offload_folder: str | None = None
    tp_plan: Literal["auto"] | None = None

    @property
    def placement(self) -> Placement | None:
        """Where the model lies; None: on one device."""
        if self.device_map is None and self.tp_plan is None:
            return None
        return Placement(self.device_map, self.max_memory, self.offload_folder, self.tp_plan)

    @model_validator(mode="after")
    def _check_placement(self) -> TransformersSettings:
        if self.device_map is None and (self.max_memory is not None or self.offload_folder is not None):
            raise ValueError("max_memory, offload_folder: are read with device_map; set it, or drop them")
        if self.device_map is not None and self.tp_plan is not None:
            raise ValueError("device_map and tp_plan: expected one of them; drop the other")
        return self


def _table(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnyEngineSettings = Annotated[
    SerializeAsAny[EngineSettings],
    variant(ENGINES, lambda settings: settings, key="name", default="transformers"),
    BeforeValidator(_table),
]
"""The type of a field that holds `[teacher.engine]` of any engine; a bare name stands for a table with that name."""
