"""Engines for tests: the model that transformers loads, a document at a time, or with a fault."""

from typing import ClassVar, Literal

import torch

from softcache.errors import EngineError
from softcache.models.language import build_language_model, split
from softcache.teacher.engines import Engine, EngineSettings


class ModuleEngine(Engine):
    """Runs each row alone through the module.

    Attributes:
        calls: rows of each call of `hidden_states`.
        failing: numbers of the calls that fail.
    """

    failing: ClassVar[set[int]] = set()

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.calls, self.starts, self.parts = [], 0, None

    def start(self):
        self.starts += 1
        self.parts = split(build_language_model(self.checkpoint.spec, vocab_size=1, context=1).eval())

    @torch.inference_mode()
    def hidden_states(self, rows):
        self.calls.append([list(row) for row in rows])
        if len(self.calls) - 1 in self.failing:
            self.parts = None
            raise EngineError("engine: out of memory")
        return [self.parts.hidden(torch.tensor([row]), None)[0] for row in rows]

    def stop(self):
        self.parts = None


class ModuleSettings(EngineSettings):
    """Settings of `ModuleEngine`; `rows` changes labels, `threads` does not."""

    name: Literal["tests.fakes_engine:ModuleSettings"]
    rows: int | None = None
    threads: int = 1

    def make(self, checkpoint, *, context, dtype):
        return ModuleEngine(checkpoint)

    def identity(self):
        return {} if self.rows is None else {"rows": self.rows}


class NarrowEngine(ModuleEngine):
    """Runs a model of another width."""

    def hidden_states(self, rows):
        return [states[:, :-1] for states in super().hidden_states(rows)]


class NarrowSettings(ModuleSettings):
    """Settings of `NarrowEngine`."""

    name: Literal["tests.fakes_engine:NarrowSettings"]  # type: ignore[assignment]

    def make(self, checkpoint, *, context, dtype):
        return NarrowEngine(checkpoint)
