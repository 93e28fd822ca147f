"""What a DistillTrainer refuses, and what to use instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainingArguments

from softcache.data.sources.text.saved_tokenizer import check_tokenizer_is_saved
from softcache.data.sources.text.special_tokens import special_tokens
from softcache.data.sources.text.table import TokenSource
from softcache.data.sources.text.tokenizer import accept_tokenizer
from softcache.errors import ConfigError, IdentityError, SpecError
from softcache.models.language import tokenizer_of
from softcache.runtime.launcher import check_launcher

if TYPE_CHECKING:
    from softcache.reader.cache import Cache


__all__ = [
    "check_classes",
    "check_tokenizer",
    "named_sources",
    "refuse_compiled",
    "refuse_ignored",
    "refuse_launcher",
    "refuse_untested",
    "tokenizer_digest",
]

UNSUPPORTED_ARGUMENTS = {
    "train_dataset": "training samples come from `source`, their labels from `cache`",
    "data_collator": "batches are made by the cache's reader",
    "compute_loss_func": "the loss is `loss`, a LossSettings; for one that it does not name use softcache.losses.fused in a "
    "loop of your own",
    "compute_metrics": "nothing makes the logits that it takes; evaluate() gives eval_loss, eval_perplexity and "
    "eval_accuracy; for more, subclass evaluation_loop",
    "preprocess_logits_for_metrics": "nothing makes the logits that it takes",
}
"""What the Trainer takes and this one would ignore."""


def refuse_ignored(args: TrainingArguments | None, trainer: dict[str, Any]) -> None:
    for name in [name for name in UNSUPPORTED_ARGUMENTS if trainer.get(name) is not None]:
        raise ConfigError(
            f"DistillTrainer: {name} would be ignored; {UNSUPPORTED_ARGUMENTS[name]}; leave it out"
        )
    if args is None:
        return
    if args.label_smoothing_factor:
        raise ConfigError(
            f"DistillTrainer: label_smoothing_factor {args.label_smoothing_factor} would be ignored; the teacher's labels "
            "are soft already: set it to 0, and lower alpha for more of the ground truth"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ConfigError(
            f"DistillTrainer: average_tokens_across_devices False would weigh a row by how many its process has, of "
            f"{args.world_size} processes; expected True: the loss is the mean over the rows of all of them; leave it out"
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ConfigError(
            f"DistillTrainer: train_sampling_strategy {args.train_sampling_strategy!r} would read the cache in an order "
            'that decodes a chunk for every sample; use "random" (shuffled by blocks) or "sequential"; against padding, '
            'make the cache with source.packing = "packed"'
        )
    refuse_compiled(args, "DistillTrainer")
    if args.use_liger_kernel:
        raise ConfigError(
            "DistillTrainer: use_liger_kernel replaces the model's forward, in which the loss runs, by one with a loss of "
            "its own; apply the kernels to the model yourself, with fused_linear_cross_entropy=False, and set it to False"
        )


def refuse_compiled(args: TrainingArguments, of: str) -> None:
    if args.torch_compile:
        raise ConfigError(
            f"{of}: torch_compile compiles the model's forward, in which the loss runs by kernels of its own; leave it out, "
            "and compile what is below the head: model.model.compile(), model.transformer.compile() of GPT-2"
        )


def refuse_launcher(args: TrainingArguments, of: str) -> None:
    """Raises ConfigError for what `accelerate launch` was asked for and transformers or the loss would not do."""
    precision = args.mixed_precision
    check_launcher(
        of,
        {
            "dynamo_backend": ("no", "compile what is below the head yourself: model.model.compile()"),
            "mixed_precision": (
                precision if precision in ("bf16", "fp16") else "no",
                "set bf16 or fp16 of TrainingArguments",
            ),
            "gradient_accumulation_steps": (
                str(args.gradient_accumulation_steps),
                "set gradient_accumulation_steps of TrainingArguments",
            ),
        },
    )


def refuse_untested(trainer: Trainer) -> None:
    ways = {
        "DataParallel": trainer.args.n_gpu > 1,
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "parallelism_config": trainer.accelerator.parallelism_config is not None,
        "distributed_config": getattr(trainer, "is_distributed_loading_by_transformers", False),
    }
    for name in [name for name, used in ways.items() if used]:
        raise ConfigError(
            f"DistillTrainer: {name} splits the model or its batches in ways that were never tested here; expected "
            "one device, or one process per device: start the script with `torchrun --nproc-per-node=N`, or set "
            "CUDA_VISIBLE_DEVICES to one device"
        )


def refuse_parallel(trainer: Trainer) -> None:
    """Raises ConfigError for ways to cut a model or its batches that the loss does not go through."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    settings: Any = trainer.args.accelerator_config
    ways = {
        "DataParallel": (
            trainer.args.n_gpu > 1,
            "start the script with `torchrun --nproc-per-node=N`, or set CUDA_VISIBLE_DEVICES to one device",
        ),
        "FSDP version 1": (
            trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 2) == 1,
            'it flattens the head, which the loss reads; set fsdp_config = {"version": 2}',
        ),
        "parallelism_config": (
            trainer.accelerator.parallelism_config is not None,
            "tensor, context and sequence parallelism cut rows or the head between processes; use FSDP2 or DeepSpeed",
        ),
        "distributed_config": (
            bool(getattr(trainer, "is_distributed_loading_by_transformers", False)),
            "the loss reads the whole head, which a model that transformers cut at loading does not have; use FSDP2",
        ),
        "dispatch_batches": (
            bool(settings.dispatch_batches),
            "every process reads its own part of the cache; leave it out",
        ),
    }
    for name, (used, advice) in ways.items():
        if used:
            raise ConfigError(f"DistillTrainer: {name} does not go with a cache's labels here; {advice}")
    if trainer.is_fsdp_enabled and getattr(plugin, "cpu_ram_efficient_loading", False):
        raise ConfigError(
            "DistillTrainer: fsdp_config.cpu_ram_efficient_loading leaves the weights of all processes but the first empty, "
            "on which the model cannot be checked; set it to false"
        )


def named_sources(eval_dataset: Any) -> list[tuple[str, Any]]:
    if isinstance(eval_dataset, dict):
        return [(f"eval_dataset[{name!r}]", source) for name, source in eval_dataset.items()]
    return [] if eval_dataset is None else [("eval_dataset", eval_dataset)]


def tokenizer_digest(cache: Cache) -> str:
    return str(cache.manifest.identity["tokenizer"]["digest"])


def check_tokenizer(source: TokenSource, model: Any, tokenizer: Any) -> None:
    """Raises unless the student's tokenizer reads the tokens of the cache as they are.

    That is `tokenizer`, and the one next to the model in its folder or on the hub, where there is one: if none was passed,
    or the model has the embeddings that were loaded from there.

    Raises:
        IdentityError: it is another one, or the one that is saved with the model begins texts otherwise.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if tokenizer is not None:
        accept_tokenizer(tokenizer, source, of="processing_class")
        check_tokenizer_is_saved(tokenizer, "auto")
        begins = list(special_tokens(tokenizer, bos="auto", of="processing_class").prefix)
        if begins != list(source.prefix):
            raise IdentityError(
                f"processing_class: begins texts with {begins}; expected {list(source.prefix)}, as those of source "
                f"{source.name} begin: saved next to the student, it would have it read other texts than in training; "
                "pass load_tokenizer(config.source), which begins them as source.bos has it"
            )
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    is_loaded = _has_loaded_embeddings(model)
    if name and "?" not in name and (tokenizer is None or is_loaded):
        own = tokenizer_of(f"hf:{name}")
        if own is not None:
            way_out = (
                "" if is_loaded else " (if its embeddings are fresh, pass the cache's as processing_class)"
            )
            accept_tokenizer(own, source, of=f"model {name}{way_out}")


def _has_loaded_embeddings(model: Any) -> bool:
    """Whether a model's input embeddings are a checkpoint's, neither fresh nor resized; by a mark of transformers."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return bool(getattr(getattr(embeddings, "weight", None), "_is_hf_initialized", False))


def check_classes(cache: Cache, num_rows: int, name: str) -> None:
    """Raises SpecError where a student's head has fewer rows than the tokenizer has tokens.

    It may have fewer than the teacher's, and more: what both have beyond the tokenizer is padding of a family's vocabulary
    (151,936 and 152,064 rows of one tokenizer), which no label is of.
    """
    least = int(cache.manifest.identity["tokenizer"].get("vocab_size", cache.num_classes))
    if num_rows < least:
        raise SpecError(
            f"model {name}: its head has {num_rows} rows; the tokenizer of cache {cache.url} has {least} tokens; "
            f"resize_token_embeddings({least}), or take a student of the teacher's tokenizer"
        )
