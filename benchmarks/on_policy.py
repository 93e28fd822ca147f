"""On-policy distillation from a cache of rollouts against the live form: same student, same number of updates.

    OMP_NUM_THREADS=1 python -m benchmarks.on_policy
    pip download iglm==0.1.0 --no-deps
    OMP_NUM_THREADS=1 python -m benchmarks.on_policy --wheel iglm-0.1.0-py3-none-any.whl

Teacher and student are transformers' architectures on the standard library's source (`benchmarks.losses`), or with --wheel
those of `benchmarks.iglm`: a published GPT-2 of antibody sequences, and the architecture of its small sibling. The student
is fine-tuned first, on a cache of the teacher's labels. Each arm goes on from that student:

    live        every step samples from the student as it is and asks the teacher: a pass of both for each rollout
    offline     one cache of the first student's rollouts, each form of the policy gradient
    again       the same from a quarter of the rollouts, each seen four times
    exact       the reverse divergence over all classes at the same stored rollouts, in place of the sampled token
    off-policy  forward divergence on the teacher's own sequences, from the cache of the first stage

Scores, on held-out prompts: the exact KL(student || teacher) per token of what the trained student writes, and the loss on
the teacher's sequences. Results are kept in OUT, one line each, and not run again.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from benchmarks import iglm
from benchmarks import losses as losses_benchmark
from softcache.cache.storage.local import LocalObjects
from softcache.config.load import build_config
from softcache.config.run import RunConfig
from softcache.data.tokens import TokenBatch
from softcache.losses import LossSettings
from softcache.models.language import build_language_model, split
from softcache.models.language.sample import sample_responses
from softcache.reader.dataset import SoftLabelDataset
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.runs.rollouts import check_teacher_consistency, open_policy
from softcache.runtime.logging import log_info
from softcache.student.tasks import TokenStudent
from softcache.teacher.language import LanguageTeacher
from softcache.teacher.rollouts import Prompt, generate_rollouts, prompts_of, rollout_prompts

FORMS: dict[str, dict[str, Any]] = {
    "offline, A of the policy": {"advantage": "sampling"},
    "offline, A of the policy, clip 0.2": {"advantage": "sampling", "clip": 0.2},
    "offline, A of the student": {},
    "offline, as Lightning OPD": {"importance": False},
}


class Lengths(NamedTuple):
    """Tokens of a sample, of a prompt, and of a response at most."""

    sample: int
    prompt: int
    response: int


@dataclass
class Stage:
    """What the arms of a seed share."""

    teacher: LanguageTeacher
    start: Path
    prompts: list[Prompt]
    held_out: list[Prompt]
    rollouts: SoftLabelDataset
    sequences: SoftLabelDataset
    evaluation: Any
    end: int
    lengths: Lengths
    vocab_size: int


def sample(model: Any, stage: Stage, prompts: list[Prompt], seed: int) -> list[Any]:
    """Returns what a model writes after prompts."""
    tokens = [prompt.tokens for prompt in prompts]
    return sample_responses(
        model.eval(),
        split(model),
        tokens,
        max_tokens=[min(stage.lengths.response, stage.lengths.sample - len(x)) for x in tokens],
        end_tokens={stage.end},
        vocab_size=stage.vocab_size,
        seed=seed,
    )


def batch_of(prompts: list[Prompt], responses: list[Any]) -> TokenBatch:
    """Returns prompts and responses as a batch, with the log-probabilities of the sampled tokens."""
    rows = [np.concatenate([p.tokens, r.tokens]) for p, r in zip(prompts, responses, strict=True)]
    lengths = np.array([len(row) for row in rows])
    tokens_BL = np.zeros((len(rows), lengths.max()), np.int64)
    learnt_BL = np.zeros(tokens_BL.shape, bool)
    log_probs_BL = np.full(tokens_BL.shape, np.nan, np.float32)
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        inside = slice(len(prompt.tokens), lengths[number])
        tokens_BL[number, : lengths[number]] = rows[number]
        learnt_BL[number, inside] = True
        log_probs_BL[number, inside] = response.log_probs
    places_P = np.flatnonzero(learnt_BL)
    padding_BL = np.arange(tokens_BL.shape[1]) >= lengths[:, None]
    return TokenBatch(
        tokens=torch.from_numpy(tokens_BL),
        segments=torch.from_numpy(padding_BL.astype(np.int64)),
        rows=torch.from_numpy(places_P - 1),
        targets=torch.from_numpy(tokens_BL.reshape(-1)[places_P]),
        lengths=lengths,
        row_counts=learnt_BL.sum(1),
        samples=np.arange(len(rows)),
        view=0,
        fingerprints=np.zeros(len(rows), np.uint64),
        sampling_log_probs=torch.from_numpy(log_probs_BL.reshape(-1)[places_P]),
    )


def student_of(stage: Stage, loss: LossSettings) -> TokenStudent:
    model = build_language_model(
        f"hf:{stage.start}", vocab_size=stage.vocab_size, context=stage.lengths.sample
    )
    return TokenStudent(model, loss, context=stage.lengths.sample)


def updates(student: TokenStudent, losses: Iterator[torch.Tensor], lr: float) -> Iterator[None]:
    """Makes one update for each loss."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        yield


def order_of(size: int, steps: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the numbers of each step's samples: whole passes, each in a new order."""
    draw, left = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(steps):
        if len(left) < batch:
            left = np.concatenate([left, draw.permutation(size)])
        yield left[:batch]
        left = left[batch:]


@torch.no_grad()
def scores(student: TokenStudent, stage: Stage) -> dict[str, float]:
    """Returns the exact divergence per token of what the student writes, and its loss on the teacher's sequences."""
    student.eval()
    total, rows = 0.0, 0
    for start in range(0, len(stage.held_out), 64):
        prompts = stage.held_out[start : start + 64]
        batch = batch_of(prompts, sample(student.model, stage, prompts, seed=10**6 + start))
        log_p_PV = torch.cat(list(stage.teacher.chunks(batch))).double().log_softmax(-1)
        log_s_PV = student.logits(batch).double().log_softmax(-1)
        total += float((log_s_PV.exp() * (log_s_PV - log_p_PV)).sum())
        rows += batch.num_rows
    nats, tokens = 0.0, 0
    for start in range(0, len(stage.evaluation), 64):
        batch = stage.evaluation.load(range(start, min(start + 64, len(stage.evaluation))))
        loss_P, _ = student.scores(batch)
        nats, tokens = nats + float(loss_P.double().sum()), tokens + len(loss_P)
    return {"reverse_kl": total / rows, "eval_loss": nats / tokens}


def run_arm(name: str, stage: Stage, *, steps: int, batch: int, lr: float, seed: int) -> dict[str, Any]:
    """Trains one arm from the first student; returns scores, teacher tokens and seconds."""
    torch.manual_seed(seed)
    teacher_tokens, parts = 0, dict.fromkeys(("student samples", "teacher", "update"), 0.0)
    form = {} if name == "live" else FORMS.get(name.removesuffix(", a quarter four times"), {})
    kind = {"exact reverse KL": "reverse_kl", "off-policy forward KL": "forward_kl"}.get(
        name, "policy_gradient"
    )
    loss = LossSettings(name=kind, alpha=1.0, **form)
    student = student_of(stage, loss)
    source = stage.sequences if kind == "forward_kl" else stage.rollouts
    size = len(source) // 4 if name.endswith("a quarter four times") else len(source)

    def losses() -> Iterator[torch.Tensor]:
        nonlocal teacher_tokens
        for step, numbers in enumerate(order_of(size, steps, batch, seed)):
            if name == "live":
                prompts = [stage.prompts[number] for number in numbers.tolist()]
                begun = time.perf_counter()
                rollouts = batch_of(prompts, sample(student.model, stage, prompts, seed * 10**4 + step))
                parts["student samples"] += time.perf_counter() - begun
                teacher_tokens += rollouts.num_rows
                student.train()
                begun = time.perf_counter()
                labels = list(stage.teacher.chunks(rollouts))
                parts["teacher"] += time.perf_counter() - begun
                yield student(rollouts, None, 1.0, teacher=_Known(labels, stage.teacher.num_classes))
                continue
            student.train()
            found = source.load(numbers, 0)
            labels_P = found.labels.to_torch()
            yield student(found, labels_P, 1.0)

    begun = time.perf_counter()
    for _ in updates(student, losses(), lr):
        pass
    seconds = time.perf_counter() - begun
    return {
        "arm": name, "seed": seed, **scores(student, stage), "teacher_tokens": teacher_tokens, "seconds": seconds, "lr": lr,
        "steps": steps, "sampling_seconds": parts["student samples"], "teacher_seconds": parts["teacher"],
    }  # fmt: skip


@dataclass
class _Known:
    """A teacher's answer that is there already, as the online teacher of a batch."""

    logits: list[torch.Tensor]
    num_classes: int

    def chunks(self, batch: Any) -> Iterator[torch.Tensor]:
        yield from self.logits


def prepare(
    out: Path, tables: dict[str, Any], lengths: Lengths, seed: int, *, steps: int, batch: int
) -> tuple[Stage, dict[str, float]]:
    """Makes what is missing of a seed's first stage, rollouts and caches; returns it and what it took."""
    cost: dict[str, float] = {}
    config = build_config(tables, "benchmarks.on_policy")
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    data = open_data(config)
    teacher = open_teacher(config, data)
    cache, _ = capture_labels(config, data, teacher, str(out / "sequences"))
    sft = out / f"sft-{seed}"
    config = config.model_copy(update={"cache": str(out / "sequences")})
    train_student(config, data, model=config.student.model, labels="cache", cache=cache, out=sft)
    settings = {
        "policy": str(sft), "prompt_tokens": lengths.prompt, "max_tokens": lengths.response, "seed": seed,
        "part_prompts": 10**6,
        "num_samples": -(-steps * batch // len(data.train)),
    }  # fmt: skip
    sampling = config.model_copy(update={"rollouts": type(config.rollouts)(**settings)})
    policy, sft_teacher = open_policy(sampling, data)
    prompts = rollout_prompts(data, sampling.rollouts)
    folder = out / f"rollouts-{seed}"
    begun = time.perf_counter()
    made = generate_rollouts(
        LocalObjects(folder, create=True), data, policy, sampling.rollouts, prompts, sft_teacher=sft_teacher
    )
    if made.parts_done:
        cost["sampling_seconds"] = time.perf_counter() - begun
    source = {
        "modality": "text", "name": "rollouts", "path": str(folder), "seq_len": lengths.sample, "packing": "documents",
        "data_dir": str(out / "data"), "shuffle_documents": False,
    }  # fmt: skip
    student = {"model": f"hf:{sft / 'hf'}"}
    tables = {
        **tables, "source": source, "student": student, "loss": {"name": "policy_gradient"}, "labels": {"policy": "dense"},
    }  # fmt: skip
    of_rollouts: RunConfig = build_config(tables, "benchmarks.on_policy")
    rollouts = open_data(of_rollouts)
    begun = time.perf_counter()
    labels, report = capture_labels(of_rollouts, rollouts, teacher, str(out / f"rollouts-cache-{seed}"))
    if report.units_done:
        cost["teacher_seconds"] = time.perf_counter() - begun
    check_teacher_consistency(of_rollouts, labels.manifest.identity["teacher"], "the rollouts' cache")
    stage = Stage(
        teacher=teacher,
        start=sft / "hf",
        prompts=prompts,
        held_out=list(prompts_of(data.evaluation, lengths.prompt)),
        rollouts=SoftLabelDataset(rollouts.train, labels),
        sequences=SoftLabelDataset(data.train, cache),
        evaluation=data.evaluation,
        end=int(data.tokenizer.eos_token_id),
        lengths=lengths,
        vocab_size=data.num_classes,
    )
    cost["teacher_tokens"] = labels.manifest.total_rows
    return stage, cost


@click.command()
@click.option("--wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Of iglm.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", default=60, show_default=True, help="Updates of each arm.")
@click.option("--batch", default=32, show_default=True, help="Rollouts of an update.")
@click.option("--lr", default=3e-4, show_default=True)
@click.option(
    "--train", "num_train", default=1000, show_default=True, help="Sequences of iglm's first stage."
)
@click.option("--held-out", "num_held_out", default=250, show_default=True, help="Of iglm.")
@click.option("--epochs", default=3, show_default=True, help="Of the first stage.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/on-policy-bench", show_default=True)
def main(
    wheel: Path | None,
    seeds: str,
    steps: int,
    batch: int,
    lr: float,
    num_train: int,
    num_held_out: int,
    epochs: int,
    out: Path,
) -> None:
    """Distil on-policy from stored rollouts and live; print score, teacher tokens and seconds of each arm."""
    (out / "texts").mkdir(parents=True, exist_ok=True)
    if wheel is None:
        lengths = Lengths(64, 16, 32)
        tables: dict[str, Any] = losses_benchmark.tables_of("text", out)
        tables["train"]["epochs"] = epochs
        config = build_config(tables, "benchmarks.on_policy")
        losses_benchmark.train_missing_teacher(config, open_data(config), out / "text")
    else:
        lengths, tables = Lengths(160, 8, 150), iglm.tables_of(out, epochs)
        with zipfile.ZipFile(wheel) as file:
            for name in ("IgLM", "IgLM-S"):
                if not (out / name / "tokenizer.json").exists():
                    iglm.save_checkpoint(file, name, out / name)
        iglm.write_sequences(out / "IgLM", out / "texts/train.jsonl", num_train, seed=0)
        iglm.write_sequences(out / "IgLM", out / "texts/test.jsonl", num_held_out, seed=10**6)
    quarter = [f"{name}, a quarter four times" for name in FORMS]
    arms = ["live", *FORMS, *quarter, "exact reverse KL", "off-policy forward KL"]
    path = out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def keep(row: dict[str, Any]) -> None:
        results.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        log_info(json.dumps(row))

    for seed in map(int, seeds.split(",")):
        stage, cost = prepare(out, tables, lengths, seed, steps=steps, batch=batch)
        done = {(row["arm"], row["seed"], row.get("lr")) for row in results}
        if ("start", seed, None) not in done:
            first = scores(student_of(stage, LossSettings(name="policy_gradient")), stage)
            keep({"arm": "start", "seed": seed, **first, **{f"once_{key}": x for key, x in cost.items()}})
        for arm in arms:
            if (arm, seed, lr) not in done:
                keep(run_arm(arm, stage, steps=steps, batch=batch, lr=lr, seed=seed))
    _print(results, lr)


def _print(results: list[dict[str, Any]], lr: float) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        if row.get("lr", lr) == lr:
            rows.setdefault(row["arm"], []).append(row)
    mean: Callable[[list[float]], str] = lambda x: (
        f"{np.mean(x):.4f} ± {np.std(x, ddof=min(1, len(x) - 1)):.4f}"
    )
    for arm, found in rows.items():
        figures = [mean([row[key] for row in found]) for key in ("reverse_kl", "eval_loss")]
        seconds = np.mean([row.get("seconds", 0.0) for row in found])
        click.echo(
            f"{arm:55} {figures[0]}  {figures[1]}  {found[0].get('teacher_tokens', 0):>9,} {seconds:8.1f} s"
        )


if __name__ == "__main__":
    main()
