"""What four silent faults cost labels and students of language models, each against how it is done.

    python -m benchmarks.language_faults

    prompts     chats cut at every `seq_len` tokens ("packed"), against whole chats ("best_fit"): the share of learned rows
                whose prompt is not in their sample, and how full samples are
    head        logits of a bfloat16 head rounded to bfloat16, against its float32 accumulator: the error of top-64 labels
    weights     a student's bfloat16 weights, against float32 ones: the share of weights that an epoch's updates change

Prints a table; a minute on two cores. All data is made here.
"""

from __future__ import annotations

import click
import numpy as np
import torch

from softcache.data.sources.text.packing import Account, Encoded, cut_documents
from softcache.labels.sparsify import top_k
from softcache.runtime.linear import linear_float32


def chats(mean: int, count: int, seed: int, *, whole: bool) -> list[Encoded]:
    """Returns chats of log-normal lengths, the first 30 percent of each its prompt."""
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5**2 / 2, 0.5, count).astype(int) + 8
    return [
        Encoded(str(number), np.zeros(length, np.int32), np.arange(length) >= 0.3 * length, has_prompt=whole)
        for number, length in enumerate(lengths.tolist())
    ]


def without_prompt(mean: int, seq_len: int, packing: str) -> tuple[float, float]:
    """Returns the share of label rows in segments that do not start with a prompt, and how full samples are."""
    bare = rows = tokens = samples = 0
    options = {"packing": packing, "seq_len": seq_len, "account": Account()}
    for cut in cut_documents(chats(mean, 4000, 0, whole=packing == "best_fit"), **options):
        samples, tokens = samples + 1, tokens + len(cut.sample.tokens)
        for segment in np.unique(cut.sample.segments):
            inside = cut.sample.segments == segment
            num = int(cut.sample.learnt[inside][1:].sum())
            rows += num
            bare += num * bool(cut.sample.learnt[inside][0])  # it starts in the middle of an answer
    return bare / rows, tokens / (samples * seq_len)


def head_errors(
    rows: int = 256, width: int = 512, classes: int = 32_000
) -> dict[str, tuple[float, float, float]]:
    """Returns by road the mean and largest error of top-64 log-probabilities (nats), and the share of tied neighbors."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).bfloat16()
    weight = (torch.randn(classes, width) * 3 / width**0.5).bfloat16()
    exact = hidden.double() @ weight.double().T
    reference, ids = exact.log_softmax(-1).topk(64)
    found = {}
    for road, logits in (
        ("rounded to bfloat16", (hidden @ weight.T).float()),
        ("float32 accumulator", linear_float32(hidden, weight)),
    ):
        error = (logits.double().log_softmax(-1).gather(1, ids) - reference).abs()
        values = top_k(logits, k=64).log_probs
        ties = (values[:, 1:] == values[:, :-1]).double().mean()
        found[road] = float(error.mean()), float(error.max()), float(ties)
    return found


def changed_weights(dtype: torch.dtype, lr: float = 2e-5, steps: int = 50) -> float:
    """Returns the share of a linear layer's weights that differ after some steps of AdamW."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 256).bfloat16().to(dtype)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        inputs = torch.randn(32, 256).to(dtype)
        torch.nn.functional.mse_loss(layer(inputs), inputs.roll(1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((layer.weight != before).float().mean())


@click.command()
def main() -> None:
    """Compare labels of language models with the faults that they once had."""
    print(
        "| chats of mean length, seq_len | packed: rows without their prompt | best_fit | packed: full | best_fit |"
    )
    print("|---|--:|--:|--:|--:|")
    for mean, seq_len in ((600, 2048), (600, 1024), (4000, 4096)):
        (bare, full), (none, fit) = (without_prompt(mean, seq_len, x) for x in ("packed", "best_fit"))
        print(f"| {mean}, {seq_len} | {bare:.1%} | {none:.1%} | {full:.1%} | {fit:.1%} |")
    print("\n| top-64 labels of a bfloat16 head | mean error, nats | largest | neighbors that tie |")
    print("|---|--:|--:|--:|")
    for road, (mean_error, largest, ties) in head_errors().items():
        print(f"| {road} | {mean_error:.2g} | {largest:.2g} | {ties:.0%} |")
    print("\n| weights of a student, lr 2e-5, 50 steps | changed |")
    print("|---|--:|")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"| {str(dtype).removeprefix('torch.')} | {changed_weights(dtype):.1%} |")


if __name__ == "__main__":
    main()
