"""What TRL's SFTTrainer takes and softcache's would ignore, refused by name.

Apart from the trainer (`softcache.student.integrations.trl`), so that a newer SFTConfig is compared with one file.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoConfig

from softcache.errors import ConfigError
from softcache.losses.target_class import IGNORED
from softcache.student.integrations.huggingface.validate import refuse_compiled

if TYPE_CHECKING:
    from trl import SFTConfig

    from softcache.data.sources.text.source import TokenSource

__all__ = ["adds_router_loss", "check_answers", "refuse_ignored"]

IGNORED_BY_LOSS = {
    "data_collator": "batches are made by SoftLabelCollator",
    "compute_loss_func": "the loss is `loss`, a LossSettings",
    "compute_metrics": "nothing makes the logits that it takes; evaluate() gives eval_loss",
    "preprocess_logits_for_metrics": "nothing makes the logits that it takes",
    "formatting_func": "samples are those of `source`",
}
"""What SFTTrainer takes and this one would ignore."""

_THE_LOSS = "the loss is softcache's"
IGNORED_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, _THE_LOSS),
    "loss_type": ("nll", _THE_LOSS),
    "use_liger_kernel": (False, _THE_LOSS),
    "router_aux_loss_coef": (0.0, "a mixture of experts learns by [loss] alone"),
    "shuffle_dataset": (
        False,
        "rows are read as they are; pass to_hf_dataset(cache, source).shuffle(seed=…)",
    ),
    "eval_packing": (False, "samples are packed by the source"),
    "pad_to_multiple_of": (
        None,
        'samples are padded to the longest of a batch; against padding set source.packing = "packed"',
    ),
    "chat_template_path": (
        None,
        "chats have the template that was labeled; set source.chat_template where the cache is made",
    ),
    "eos_token": (None, "texts end as the source's tokenizer ended them"),
}
"""Fields of SFTConfig that the source or the loss decides, and their plain values."""

ROWS_TO_LOOK_AT = 256


def refuse_ignored(args: SFTConfig, trainer: dict[str, Any], source: TokenSource) -> None:
    """Raises ConfigError where SFTTrainer would do what the source or the loss decides, or would not do what it is told.

    Args:
        trainer: what else the trainer was given, by name.
    """
    for name in [name for name in IGNORED_BY_LOSS if trainer.get(name) is not None]:
        raise ConfigError(
            f"DistillSFTTrainer: {name} would be ignored; {IGNORED_BY_LOSS[name]}; leave it out"
        )
    if args.world_size > 1:
        raise ConfigError(
            f"DistillSFTTrainer: {args.world_size} processes, which was never tested here; expected one; use "
            "DistillTrainer, which takes one process per device"
        )
    refuse_compiled(args, "DistillSFTTrainer")
    if args.packing:
        raise ConfigError(
            "DistillSFTTrainer: packing would part tokens from their labels; samples are packed by the source already: set "
            'it to False, and source.packing = "best_fit" or "packed" where the cache is made'
        )
    if args.max_length is not None and args.max_length < source.seq_len:
        raise ConfigError(
            f"DistillSFTTrainer: max_length {args.max_length} would cut samples of up to {source.seq_len} tokens; set it to "
            "None, or make the cache with a shorter source.seq_len"
        )
    for name, (plain, advice) in IGNORED_ARGUMENTS.items():
        if (found := getattr(args, name, plain)) not in (None, plain):
            raise ConfigError(f"DistillSFTTrainer: {name} {found!r} would be ignored, {advice}; leave it out")


def check_answers(args: SFTConfig, rows: Any, source: TokenSource) -> None:
    """Raises ConfigError where `completion_only_loss` or `assistant_only_loss` asks for other tokens than have labels.

    A document without a prompt has a label for each token but those that begin it, and the first of a continuation.
    """
    has_columns = [name for name in ("labels", "seq_lengths") if name in (rows.column_names or ())]
    firsts = islice(rows.select_columns(has_columns), ROWS_TO_LOOK_AT) if has_columns else ()
    has_prompts = any(
        np.equal(row["labels"], IGNORED).sum() > len(row.get("seq_lengths", [0])) * (len(source.prefix) + 1)
        for row in firsts
    )
    for name, asked in (
        ("completion_only_loss", args.completion_only_loss),
        ("assistant_only_loss", args.assistant_only_loss or None),
    ):
        if has_columns and asked is not None and asked != has_prompts:
            raise ConfigError(
                f"DistillSFTTrainer: {name} {asked} would be ignored: "
                + (
                    "prompts of this source are not learned, and have no labels; leave it out, or make the cache of texts "
                    "without prompts"
                    if has_prompts
                    else "these are texts without prompts, of which all is learned; leave it out, or make the cache of "
                    "chats, or of prompts and completions"
                )
            )


def adds_router_loss(model: Any, args: SFTConfig) -> bool:
    """Returns whether a model's own settings have it add the balance of its experts' load to its loss."""
    if isinstance(model, str):
        given: Any = args.model_init_kwargs or {}
        how = {name: given[name] for name in ("revision", "output_router_logits") if name in given}
        remote = given.get("trust_remote_code", getattr(args, "trust_remote_code", False))
        config = AutoConfig.from_pretrained(model, trust_remote_code=remote, **how)
    else:
        config = model.config
    return bool(getattr(config.get_text_config(), "output_router_logits", False))
