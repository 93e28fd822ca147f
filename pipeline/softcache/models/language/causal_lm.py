"""From a spec to a causal language model.

    gpt2 | llama | qwen3 [?width=…&depth=…&heads=…&kv_heads=…&mlp=…&tied=…]   built in, fresh weights
    hf:NAME_OR_PATH[?dtype=…&attn_implementation=…&revision=…]    from_pretrained, safetensors only
    hf-config:NAME_OR_PATH[?key=…]                                fresh weights of that configuration
    package.module:factory[?arg=…]                                your own; called with your arguments,
                                                                  plus vocab_size and context where its
                                                                  signature takes them

`gradient_checkpointing=true` goes with each but the last; `load_in_4bit=true`, `load_in_8bit=true` and the other settings
of transformers' BitsAndBytesConfig with `hf:`. A model of texts and images (Mistral 3) is run on texts alone. Code from a
hub is never run: there is no `trust_remote_code`, and no attention kernel by repository name.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.errors import MissingExtraError, SpecError
from softcache.models.language.encoder_decoder_parts import is_encoder_decoder
from softcache.models.language.placement import Placement
from softcache.models.language.probes import check_max_length
from softcache.models.language.splitting import context_of, head_of
from softcache.models.spec import ModelSpec, is_path, parse_spec, unknown_name
from softcache.models.weights import refuse_adapter
from softcache.runtime.optional import auto_tokenizer

__all__ = ["auto_class", "build_language_model", "safe_arguments", "tokenizer_of"]

BITSANDBYTES = ("load_in_4bit", "load_in_8bit", "bnb_4bit_", "llm_int8_")
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def transformers_library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"language models need transformers ({error}); pip install 'softcache[text]'"
        ) from error
    logging.getLogger("transformers.modeling_utils").addFilter(_concerns_us)
    return transformers


def _concerns_us(record: logging.LogRecord) -> bool:
    """Whether a warning of transformers is about what happens here: padding comes after the tokens, where causal attention
    never looks, and the loss is not the model's."""
    text = record.getMessage()
    return "your input_ids may be padded" not in text and not text.startswith("`loss_type=None`")


def build_language_model(
    spec: str, *, vocab_size: int, context: int, placement: Placement | None = None
) -> nn.Module:
    """Returns a causal language model in evaluation mode for `hf:`, else freshly initialised.

    Args:
        spec: see the module docstring. `hf:` keeps the checkpoint's dtype unless `dtype=` is given;
            fresh weights are float32.
        vocab_size: V. `hf:` and factories may have more rows (padded vocabularies), never fewer.
        context: L, the longest row that the model must take.
        placement: of an `hf:` model on more than one device.

    Raises:
        SpecError: unknown name (the nearest ones are listed), arguments that the model refuses, a
            checkpoint that is not there, is not safetensors or lacks weights, or a model too small for
            the vocabulary or the context.
        MissingExtraError: transformers is not installed.
    """
    parsed = parse_spec(spec)
    scheme, _, name = parsed.name.partition(":")
    build: Callable[..., nn.Module] = from_factory
    from_checkpoint: Callable[..., nn.Module] = partial(pretrained, placement=placement)
    if parsed.family == "builtin":
        build = _builtin
    elif scheme in ("hf", "hf-config"):
        parsed = replace(parsed, family=scheme, name=name)
        build = {"hf": from_checkpoint, "hf-config": _from_config_of}[scheme]
    try:
        model = build(spec, parsed, vocab_size, context)
    except (SpecError, MissingExtraError):
        raise
    except Exception as error:
        # A third-party constructor may raise anything; the user needs to know which spec it was.
        raise SpecError(
            f"model {spec!r}: cannot be built for {vocab_size} tokens and rows of {context}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:400]}; check the name, and the "
            "arguments after '?'"
        ) from error
    if is_encoder_decoder(model):
        raise SpecError(
            f"model {spec!r}: it has an encoder and a decoder; expected a causal language model for a text; pairs of texts "
            'are source.modality = "translation"'
        )
    check_size(spec, model, vocab_size, context)
    return model


def check_size(spec: str, model: nn.Module, vocab_size: int, context: int) -> None:
    check_max_length(f"model {spec!r}", context_of(model), context)
    head = head_of(model)
    if isinstance(head, nn.Linear) and head.out_features < vocab_size:
        raise SpecError(
            f"model {spec!r}: its head has {head.out_features} rows; the source has {vocab_size} tokens; "
            "the tokenizer and the model do not belong together"
        )


def _gpt2(vocab_size: int, context: int, *, width: int = 256, depth: int = 4, heads: int = 4,
          mlp: int | None = None, tied: bool = True) -> Any:  # fmt: skip
    return transformers_library().GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        n_inner=mlp or 4 * width,
        tie_word_embeddings=tied,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
    )


def _rotary(name: str) -> Callable[..., Any]:
    def config(vocab_size: int, context: int, *, width: int = 256, depth: int = 4, heads: int = 4,
               kv_heads: int | None = None, mlp: int | None = None, tied: bool = True) -> Any:  # fmt: skip
        if width % heads or heads % (kv_heads or heads):
            raise ValueError(f"{heads} heads do not divide width {width}, or {kv_heads} kv_heads the heads")
        return getattr(transformers_library(), name)(
            vocab_size=vocab_size,
            max_position_embeddings=context,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            head_dim=width // heads,
            # Three matrices of 8/3 width weigh as much as the two of 4 width in GPT-2.
            intermediate_size=mlp or -(-8 * width // 3 // 32) * 32,
            tie_word_embeddings=tied,
            attention_dropout=0.0,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
        )

    return config


BUILTIN: dict[str, Callable[..., Any]] = {
    "gpt2": _gpt2,
    "llama": _rotary("LlamaConfig"),
    "qwen3": _rotary("Qwen3Config"),
}


def _builtin(spec: str, parsed: ModelSpec, vocab_size: int, context: int) -> nn.Module:
    if parsed.name not in BUILTIN:
        others = "hf:NAME_OR_PATH, hf-config:NAME_OR_PATH or module:factory"
        raise unknown_name(f"model {spec!r}", parsed.name, BUILTIN, others=others)
    args = dict(parsed.args)
    checkpointing = args.pop("gradient_checkpointing", False)
    config = BUILTIN[parsed.name](vocab_size, context, **args)
    model = transformers_library().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return with_checkpointing(model, checkpointing)


def with_checkpointing(model: Any, enabled: bool) -> nn.Module:
    if enabled:
        # The reentrant variant needs an input with a gradient and does not go with DDP.
        new = hasattr(model, "activation_checkpointing_enable")  # its name from 5.23 to 6
        enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def safe_arguments(spec: str, parsed: ModelSpec) -> tuple[str, dict[str, Any], bool]:
    """Returns (name or path, arguments, gradient checkpointing); refuses what would run foreign code."""
    args = dict(parsed.args)
    for banned in (
        "trust_remote_code",
        "use_kernels",
        "allow_all_kernels",
        "use_safetensors",
        "weights_only",
    ):
        if banned in args:
            raise SpecError(
                f"model {spec!r}: {banned} is not an argument here: softcache runs no code that a checkpoint "
                "or a hub brings along; write a module:factory of your own if you trust it"
            )
    attention = args.get("attn_implementation", "sdpa")
    if attention not in ATTENTION:
        raise SpecError(
            f"model {spec!r}: attn_implementation {attention!r}; expected one of {', '.join(ATTENTION)}"
        )
    path = Path(parsed.name).expanduser()
    if path.is_dir():
        return str(path), args, args.pop("gradient_checkpointing", False)
    if is_path(parsed.name):
        raise SpecError(f"model {spec!r}: no such folder: {path}; expected one that save_pretrained wrote")
    return parsed.name, args, args.pop("gradient_checkpointing", False)


def pretrained(
    spec: str,
    parsed: ModelSpec,
    vocab_size: int,
    context: int,
    *,
    auto: str = "AutoModelForCausalLM",
    placement: Placement | None = None,
) -> nn.Module:
    name, args, checkpointing = safe_arguments(spec, parsed)
    path = Path(name) / str(args.get("subfolder", ""))
    hub = {key: args[key] for key in ("revision", "subfolder") if key in args}
    transformers = transformers_library()
    refuse_adapter(spec, name, **hub)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        raise SpecError(
            f"model {spec!r}: no *.safetensors in the folder; found {', '.join(pickled) or 'no weights'}; "
            "pickled weights can run code: load them where you trust them and save_pretrained(...) again"
        )
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    args |= exact_attention(spec, config, args)
    model, info = auto_class(config, auto).from_pretrained(
        name,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **_with_quantization(spec, args),
        **({} if placement is None else placement.arguments(config, spec)),
    )
    # transformers fills what a checkpoint lacks with random numbers, and only warns.
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise SpecError(
            f"model {spec!r}: the checkpoint lacks {len(absent)} weights that the model needs "
            f"({', '.join(absent[:5])}); they would be random; expected a causal language model with its head"
        )
    refuse_left_out(spec, [key for key in map(str, info["unexpected_keys"]) if _is_of_a_layer(model, key)])
    refuse_own_class(spec, config, model, auto)
    return with_checkpointing(model, checkpointing)


def refuse_left_out(spec: str, unused: Iterable[str]) -> None:
    """Raises SpecError where a checkpoint has weights, of layers of the model, that its configuration leaves out."""
    if keys := sorted(unused):
        raise SpecError(
            f"model {spec!r}: its configuration leaves out {len(keys)} weights of the checkpoint, of layers that it uses "
            f"({', '.join(keys[:5])}); expected the one that it was trained with: mend config.json (attention_bias)"
        )


def refuse_own_class(spec: str, config: Any, model: nn.Module, auto: str = "AutoModelForCausalLM") -> None:
    """Raises SpecError where a checkpoint is run by code of its own, in a class that transformers has not.

    transformers would load its weights into the class of its `model_type`, without a word. Spelling may differ, as in
    `MPTForCausalLM`.
    """
    own = str((getattr(config, "auto_map", None) or {}).get(auto, "")).rpartition(".")[2]
    plain = type(model).__name__
    if own and own.replace("_", "").casefold() != plain.replace("_", "").casefold():
        raise SpecError(
            f"model {spec!r}: its class is {own}, of code that it brings along and that is never run here (auto_map of "
            f"config.json); found {plain}, which transformers has for model_type {config.model_type}, and which may be "
            "another model; write a module:factory of your own if you trust the code, or take auto_map out if they are one"
        )


def _is_of_a_layer(model: nn.Module, key: str) -> bool:
    """Whether a weight that was not loaded is of a layer of the model, and not of another head or a part for training."""
    path, _, name = key.rpartition(".")
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        return False
    return name in ("weight", "bias") and any(True for _ in layer.parameters(recurse=False))


def exact_attention(spec: str, config: Any, args: dict[str, Any]) -> dict[str, str]:
    """Returns the argument for an attention that caps its scores, of a model that does, such as Gemma 2.

    torch's scaled_dot_product_attention has no cap, and some versions of transformers leave it out there: labels are off by
    0.002 nats.

    Raises:
        SpecError: the spec asks for that attention.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None:
        return {}
    if args.get("attn_implementation") == "sdpa":
        raise SpecError(
            f"model {spec!r}: attn_implementation 'sdpa' leaves out the cap on attention scores that {config.model_type} "
            "was trained with; drop it for eager, or take flash_attention_2 or flex_attention"
        )
    return {} if "attn_implementation" in args else {"attn_implementation": "eager"}


def auto_class(config: Any, auto: str = "AutoModelForCausalLM") -> Any:
    """Returns transformers' class for a configuration: that of images and texts for models that have no other."""
    library = transformers_library()
    of_text, of_both = library.MODEL_FOR_CAUSAL_LM_MAPPING, library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if auto == "AutoModelForCausalLM" and type(config) not in of_text and type(config) in of_both:
        return library.AutoModelForImageTextToText
    return getattr(library, auto)


def _with_quantization(spec: str, args: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with those of bitsandbytes as one `quantization_config`, which from_pretrained takes."""
    ours = {key: value for key, value in args.items() if key.startswith(BITSANDBYTES)}
    if not ours:
        return args
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"model {spec!r}: {', '.join(ours)} needs the package bitsandbytes; pip install bitsandbytes"
        )
    quantization = transformers_library().BitsAndBytesConfig(**ours)
    return {key: value for key, value in args.items() if key not in ours} | {
        "quantization_config": quantization
    }


def _from_config_of(spec: str, parsed: ModelSpec, vocab_size: int, context: int) -> nn.Module:
    name, args, checkpointing = safe_arguments(spec, parsed)
    build: dict[str, Any] = {key: args.pop(key) for key in ("dtype", "attn_implementation") if key in args}
    config, unknown = transformers_library().AutoConfig.from_pretrained(
        name, trust_remote_code=False, return_unused_kwargs=True, **{"vocab_size": vocab_size} | args
    )
    unknown.pop("trust_remote_code", None)
    if unknown:
        raise SpecError(f"model {spec!r}: the configuration has no {', '.join(unknown)}; see its config.json")
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, token, None)  # they belong to the old vocabulary, and pad is an index into it
    model = transformers_library().AutoModelForCausalLM.from_config(
        config,
        trust_remote_code=False,
        **{"dtype": torch.float32} | build | exact_attention(spec, config, build),
    )
    refuse_own_class(spec, config, model)
    return with_checkpointing(model, checkpointing)


def from_factory(spec: str, parsed: ModelSpec, vocab_size: int, context: int, **more: Any) -> nn.Module:
    module_name, _, attribute = parsed.name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"model {spec!r}: {error}; expected a built-in name ({', '.join(BUILTIN)}), hf:NAME_OR_PATH, "
            "hf-config:NAME_OR_PATH, or an importable module:factory"
        ) from error
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    offered = {"vocab_size": vocab_size, "context": context, **more}
    offered = {name: value for name, value in offered.items() if takes_any or name in parameters}
    model = factory(**offered | parsed.args)
    if not isinstance(model, nn.Module):
        raise SpecError(f"model {spec!r}: expected a torch.nn.Module; found {type(model).__name__}")
    return model


def tokenizer_of(spec: str) -> Any | None:
    """Returns the tokenizer of an `hf:` or `hf-config:` model, or None where there is none.

    It is the one of the spec's `revision`, in its `subfolder` or else above it. A folder must hold tokenizer files of its
    own: transformers would otherwise make up an empty tokenizer.
    """
    parsed = parse_spec(spec)
    scheme, _, name = parsed.name.partition(":")
    if scheme not in ("hf", "hf-config"):
        return None
    path, subfolder = Path(name).expanduser(), str(parsed.args.get("subfolder", ""))
    of, revision = f"model {spec!r}", {key: parsed.args[key] for key in ("revision",) if key in parsed.args}
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    for inside in dict.fromkeys((subfolder, "")):
        if path.is_dir() and not any((path / inside / file).is_file() for file in files):
            continue
        try:
            if path.is_dir():
                return auto_tokenizer(str(path / inside), of=of)
            return auto_tokenizer(name, of=of, **revision | ({"subfolder": inside} if inside else {}))
        except (OSError, ValueError, KeyError):
            continue
    return None
