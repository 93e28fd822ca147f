"""A pretrained pair: the 12.9 million parameters of IgLM distilled into the architecture of IgLM-S, 1.4 million.

    pip download iglm==0.1.0 --no-deps
    python -m benchmarks.iglm iglm-0.1.0-py3-none-any.whl

IgLM (Shuai, Ruffolo and Gray, 2023, Cell Systems 14(11), © 2022 The Johns Hopkins University) is a GPT-2 of antibody
sequences. Its wheel holds both checkpoints, under a license for academic, non-commercial use. The big one is the teacher, of
sequences that it writes itself; the student has the small one's configuration and fresh weights, and learns from the
sequences alone, from a cache, and from the online teacher, in the same number of steps. Both checkpoints as they were
published are scored on the same held-out sequences.

Only the weights in the wheel are read, with `torch.load(weights_only=True)`, and none of its code runs. Results are kept in
OUT as benchmarks.quality keeps them, sequences as they are written, so that a killed run goes on.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.quality import print_results, run_records
from softcache.config.load import build_config
from softcache.data.sources.text.source import open_text
from softcache.data.tokens import TokenData
from softcache.models.language import split
from softcache.runtime.logging import log_info, progress_bar

SPECIES = ("[CAMEL]", "[HUMAN]", "[MOUSE]", "[RABBIT]", "[RAT]", "[RHESUS]")
CHAINS = ("[HEAVY]", "[LIGHT]")
END, PAD, UNKNOWN, MASK, SEPARATOR = "[CLS]", "[PAD]", "[UNK]", "[MASK]", "[SEP]"
BATCH = 250


def save_checkpoint(wheel: zipfile.ZipFile, name: str, folder: Path) -> None:
    """Writes a checkpoint of the wheel as a folder of safetensors, config and tokenizer, as save_pretrained does.

    The wheel has pickled weights, ids of GPT-2's vocabulary in its configuration, and of the tokenizer a list of tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    inside = "iglm/trained_models"
    tokens = wheel.read(f"{inside}/vocab.txt").decode().split()
    ids = {token: number for number, token in enumerate(tokens)}
    config = GPT2Config(**json.loads(wheel.read(f"{inside}/{name}/config.json")))
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, ids[END], ids[PAD]
    weights = torch.load(
        io.BytesIO(wheel.read(f"{inside}/{name}/pytorch_model.bin")), map_location="cpu", weights_only=True
    )
    # Masks of attention, which older versions of transformers saved.
    weights = {key: x for key, x in weights.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    model = GPT2LMHeadModel(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    ).save_pretrained(folder)


@torch.inference_mode()
def write_sequences(folder: Path, path: Path, number: int, seed: int) -> None:
    """Writes sequences of a checkpoint as JSON lines, sampled at temperature 1, alike many of each species and chain.

    As the model was trained: a chain, a species, a sequence with one span masked, the span. Malformed ones are left out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    starts = [tokenizer.convert_tokens_to_ids([chain, species]) for chain in CHAINS for species in SPECIES]
    found = path.read_text().splitlines() if path.exists() else []
    barred = tokenizer.convert_tokens_to_ids([PAD, UNKNOWN, *CHAINS, *SPECIES])
    with progress_bar(f"sample {path.name}", number, "sequences") as advance:
        advance(len(found))
        while len(found) < number:
            torch.manual_seed(seed + len(found))
            prompt_BL = torch.tensor(
                [starts[(len(found) + n) % len(starts)] for n in range(min(BATCH, number - len(found)))]
            )
            how = {"suppress_tokens": barred, "attention_mask": torch.ones_like(prompt_BL)}
            sampled_BL = model.generate(prompt_BL, max_length=160, do_sample=True, top_k=0, top_p=1.0, **how)
            texts = [tokenizer.decode(ids).split(f" {END}")[0] for ids in sampled_BL]
            whole = [
                text
                for text, ids in zip(texts, sampled_BL.tolist(), strict=True)
                if tokenizer.eos_token_id in ids
                and text.count(MASK) == 1
                and text.count(SEPARATOR) == 1
                and text.index(MASK) < text.index(SEPARATOR)
            ][: number - len(found)]
            with path.open("a") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in whole)
            found += whole
            advance(len(whole))


def held_out_nats(folder: Path, data: TokenData) -> float:
    """Returns the mean negative log-likelihood of a checkpoint per row of a source."""
    from transformers import AutoModelForCausalLM

    parts = split(AutoModelForCausalLM.from_pretrained(folder).eval())
    nats, rows = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(data.source), 32):
            batch = data.load(range(start, min(start + 32, len(data.source))))
            hidden_PD = parts.hidden(batch.tokens, batch.segments).flatten(0, 1)[batch.rows]
            log_probs_PV = parts.logits(hidden_PD).log_softmax(-1)
            nats -= float(log_probs_PV.gather(1, batch.targets[:, None]).double().sum())
            rows += batch.num_rows
    return nats / rows


def tables_of(out: Path, epochs: int) -> dict[str, Any]:
    """Returns the config of the students."""
    return {
        "name": "iglm",
        "source": {
            "modality": "text", "name": "hf", "path": str(out / "texts"), "tokenizer": str(out / "IgLM"),
            "eval_split": "test", "seq_len": 160, "packing": "documents", "data_dir": str(out / "data"),
        },
        "teacher": {"model": f"hf:{out / 'IgLM'}"},
        "labels": {"policy": "dense"},
        "capture": {"batch_size": 16},
        "student": {"model": f"hf-config:{out / 'IgLM-S'}"},
        "loss": {"temperature": 1, "alpha": 0.9},
        "train": {
            "epochs": epochs, "batch_size": 16, "eval_batch_size": 32, "lr": 3e-3, "weight_decay": 0.1, "clip_norm": 1.0,
            "precision": "bf16",
        },
    }  # fmt: skip


@click.command()
@click.argument("wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--record", "records", multiple=True, default=("hard", "dense", "live"), show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of the students.")
@click.option("--train", "num_train", default=1000, show_default=True, help="Sequences to learn from.")
@click.option("--held-out", "num_held_out", default=250, show_default=True, help="Sequences to be scored on.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="runs/iglm", show_default=True)
def main(
    wheel: Path,
    records: tuple[str, ...],
    seeds: str,
    num_train: int,
    num_held_out: int,
    epochs: int,
    out: Path,
) -> None:
    """Distil the big checkpoint of the iglm wheel into the small one's architecture; print the held-out loss."""
    (out / "texts").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as file:
        for name in ("IgLM", "IgLM-S"):
            if not (out / name / "tokenizer.json").exists():
                save_checkpoint(file, name, out / name)
    write_sequences(out / "IgLM", out / "texts/train.jsonl", num_train, seed=0)
    write_sequences(out / "IgLM", out / "texts/test.jsonl", num_held_out, seed=10**6)
    config = build_config(tables_of(out, epochs), "benchmarks.iglm")
    results = out / "results.jsonl"
    run_records(config, records, [int(seed) for seed in seeds.split(",")], out, results)
    print_results(results, records)
    data = TokenData(open_text(config.source, split="eval"))
    for name in ("IgLM", "IgLM-S"):
        log_info(f"{name} as published: {held_out_nats(out / name, data):.4f} nats")


if __name__ == "__main__":
    main()
