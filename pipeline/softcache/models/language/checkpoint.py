"""A saved causal language model whose head and facts are read without loading its backbone.

An engine loads the backbone of such a folder; softcache reads its head, and the digest of its weights, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.errors import SpecError
from softcache.hashing.digests import digest_weights
from softcache.models.language.backbone_head import CausalParts
from softcache.models.language.causal_lm import (
    auto_class,
    check_size,
    refuse_left_out,
    refuse_own_class,
    safe_arguments,
    transformers_library,
)
from softcache.models.language.encoder_decoder_parts import is_encoder_decoder
from softcache.models.language.splitting import head_of, split
from softcache.models.spec import architecture_of, parse_spec
from softcache.models.weights import count_parameters, refuse_adapter
from softcache.runtime.files import read_json

__all__ = ["Checkpoint"]

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class Checkpoint:
    """A folder that `save_pretrained` wrote, or one of the hub.

    Attributes:
        spec: the model spec, `hf:NAME_OR_PATH[?dtype=…&revision=…]`.
        folder: where its files are.
        model: the module on the meta device: names, shapes and configuration, no weights.
        parts: backbone and head of `model`, with the scale and the soft cap of its logits.
        dtype: of its weights, unless the spec gives another one.
    """

    def __init__(self, spec: str, *, vocab_size: int, context: int) -> None:
        """Opens the folder; a model of the hub is downloaded first.

        Args:
            vocab_size: V; the head may have more rows, never fewer.
            context: the longest row that the model must take.

        Raises:
            SpecError: the spec is not of a saved model, has arguments of transformers alone, names no causal language
                model with a head, or one whose configuration leaves out weights of its layers, which engines skip, too.
        """
        self.spec = spec
        parsed = parse_spec(spec)
        scheme, _, name = parsed.name.partition(":")
        if scheme != "hf":
            raise SpecError(
                f"model {spec!r}: an engine runs saved models, hf:NAME_OR_PATH; write yours with save_pretrained(...), or "
                'set teacher.engine = "transformers"'
            )
        name, arguments, _ = safe_arguments(spec, replace(parsed, family="hf", name=name))
        if unknown := sorted(set(arguments) - {"dtype", "revision"}):
            raise SpecError(
                f"model {spec!r}: {', '.join(unknown)}: arguments of transformers, which an engine does not read; expected "
                "dtype and revision; see [teacher.engine] for the engine's own settings"
            )
        self.folder = Path(name)
        if not self.folder.is_dir():
            self.folder = _downloaded(spec, name, arguments.get("revision"))
        refuse_adapter(spec, str(self.folder))
        self._files = _tensor_files(self.folder)
        if not self._files:
            raise SpecError(
                f"model {spec!r}: no tensors in *.safetensors in {self.folder}; expected what save_pretrained(...) writes"
            )
        config = transformers_library().AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.dtype = self._dtype(config, arguments.get("dtype", "auto"))
        with torch.device("meta"):
            self.model: nn.Module = auto_class(config).from_config(
                config, trust_remote_code=False, dtype=self.dtype
            )
        self.model.eval()
        if is_encoder_decoder(self.model):
            raise SpecError(
                f"model {spec!r}: it has an encoder and a decoder; expected a causal language model"
            )
        refuse_left_out(spec, self._left_out())
        refuse_own_class(spec, config, self.model)
        check_size(spec, self.model, vocab_size, context)
        parts = split(self.model)
        assert isinstance(parts, CausalParts)
        self.parts = parts

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the head's weight [V, D] and bias [V] or None, on the CPU.

        Raises:
            SpecError: the files have no such tensor, or it is quantized.
        """
        module: Any = head_of(self.model)
        weight = self._read_parameter(module.weight)
        return weight, None if module.bias is None else self._read_parameter(module.bias)

    def with_head(self, weight: torch.Tensor, bias: torch.Tensor | None) -> CausalParts:
        """Returns the parts with these weights of the head; the backbone has none."""
        head = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias, requires_grad=False)
        return replace(self.parts, head=head)

    @property
    def architecture(self) -> str:
        """What the weights are put into; equal to that of the model that transformers loads."""
        return architecture_of(self.model, self.spec)

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.model)

    @property
    def num_bytes(self) -> int:
        """Of the files with its tensors."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    @cached_property
    def weights_digest(self) -> str:
        """The digest of the state dict that transformers would load, read tensor by tensor.

        Where transformers converts tensors at loading (experts that it merges), or they are quantized, it is that of the
        tensors as they are in the files, and differs from the digest of the loaded module.
        """
        state = self.model.state_dict()
        keys = self._keys
        with ExitStack() as files:
            shapes = {
                name: None if key is None else _open(files, self._files[key]).get_slice(key).get_shape()
                for name, key in keys.items()
            }
            if all(shapes[name] == list(tensor.shape) for name, tensor in state.items()):
                return digest_weights(_Tensors(self._files, keys, self.dtype))
        return digest_weights(_Tensors(self._files, {key: key for key in self._files}, None))

    def _dtype(self, config: Any, asked: Any) -> torch.dtype:
        """Returns the dtype that transformers would load the weights in."""
        if asked == "auto":
            asked = getattr(config, "dtype", None)
        if isinstance(asked, str):
            asked = getattr(torch, asked, asked)
        if asked is None:
            with ExitStack() as files:
                for key, path in self._files.items():
                    tensor = _open(files, path).get_tensor(key)
                    if tensor.is_floating_point():
                        return tensor.dtype
        if asked not in (torch.float32, torch.bfloat16, torch.float16):
            raise SpecError(f"model {self.spec!r}: dtype {asked}; expected float32, bfloat16 or float16")
        return asked

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _aliases(self, name: str) -> list[str]:
        """Returns the names of the tensor of this name, the name first: tied weights have several."""
        same = [other for other, tensor in self._parameters.items() if tensor is self._parameters.get(name)]
        return [name, *(other for other in same if other != name)]

    @cached_property
    def _keys(self) -> dict[str, str | None]:
        """The key in the files of each tensor of the module, None where they have none."""
        return {name: self._key(name) for name in self.model.state_dict()}

    def _left_out(self) -> Iterator[str]:
        """Yields the keys of weights and biases that the module has not, of layers of which it has another tensor."""
        used = set(filter(None, self._keys.values()))
        layers = {key.rpartition(".")[0] for key in used}
        for key in self._files.keys() - used:
            layer, _, name = key.rpartition(".")
            if layer in layers and name in ("weight", "bias"):
                yield key

    def _key(self, name: str) -> str | None:
        """Returns the key in the files of a tensor of the module, or None.

        Files may lack the prefix of the backbone (GPT-2), or have one more (models of texts and images).
        """
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        for alias in self._aliases(name):
            for candidate in (alias, alias.removeprefix(prefix), prefix + alias):
                if candidate in self._files:
                    return candidate
            longer = [key for key in self._files if key.endswith(f".{alias}")]
            if len(longer) == 1:
                return longer[0]
        return None

    def _read_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        names = [name for name, tensor in self._parameters.items() if tensor is parameter]
        own = sorted(
            names, key=lambda name: "embed" in name or "wte" in name
        )  # the head's name before the embedding's
        key = next(filter(None, map(self._key, own)), None)
        if key is None:
            similar = [key for key in self._files if own and key.startswith(own[0].rpartition(".")[0] + ".")]
            raise SpecError(
                f"model {self.spec!r}: its head cannot be found in {self.folder}: expected a tensor {' or '.join(own)}; "
                f"found {', '.join(similar) or f'{len(self._files)} others'}; keep the head out of quantization, and save "
                "it with the model"
            )
        with ExitStack() as files:
            tensor = _open(files, self._files[key]).get_tensor(key)
        if tensor.shape != parameter.shape or not tensor.is_floating_point() or tensor.element_size() < 2:
            raise SpecError(
                f"model {self.spec!r}: its head, {key} of {self.folder}, is {tensor.dtype} {tuple(tensor.shape)}; expected "
                f"floating point {tuple(parameter.shape)}; keep the head out of quantization"
            )
        return tensor.to(self.dtype)


class _Tensors(Mapping[str, torch.Tensor]):
    """Tensors of safetensors files by name, each read when it is asked for."""

    def __init__(
        self, files: Mapping[str, Path], keys: Mapping[str, str | None], dtype: torch.dtype | None
    ) -> None:
        self._files, self._keys, self._dtype = files, keys, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        key = self._keys[name]
        assert key is not None
        with ExitStack() as files:
            tensor: torch.Tensor = _open(files, self._files[key]).get_tensor(key)
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _open(files: ExitStack, path: Path) -> Any:
    from safetensors import safe_open

    return files.enter_context(safe_open(path, framework="pt"))  # type: ignore[no-untyped-call]


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor: by the index, or else of model.safetensors, or else of all files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index, "download the model again", error=SpecError).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise SpecError(
                f"{index}: weight_map: expected the file of each tensor; download the model again"
            )
        return {key: folder / name for key, name in named.items()}
    whole = folder / "model.safetensors"
    paths = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    with ExitStack() as files:
        return {key: path for path in paths for key in _open(files, path).keys()}  # noqa: SIM118


def _downloaded(spec: str, name: str, revision: Any) -> Path:
    """Returns the folder of a model of the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:
        raise SpecError(
            f"model {spec!r}: neither a folder nor to be had from the hub: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
