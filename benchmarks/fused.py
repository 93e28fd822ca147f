"""The fused loss through the head: its time against two baselines, and what it needs at its peak.

    python -m benchmarks.fused [--rounds N] [--threads N] [--json FILE] [--quick]

1. time: forward and backward from hidden states to the gradients of hidden states and head, P = 1024,
   D = 256, V = 32768, K = 32, float32, T = 2, alpha = 0.5. The baseline is dense cross-entropy,
   F.cross_entropy of the logits, without a teacher; unfused is losses.distillation_loss of the logits. Rounds
   are interleaved, and ratios are to the baseline of the same round.
2. memory: how much the process's largest resident size grows over what it held with its inputs made and a
   small case run; each case in a process of its own. The size is VmHWM of /proc/self/status, and ru_maxrss
   where there is none (on Linux that starts at the parent's). Beside the inputs, in float32,

       fused   = 4 D V + 4 D P (the gradients) + 8 chunk V (4 at T = 1 or for one part alone), chunk V = 2^23
       unfused = c P V, c bytes for every logit

   Unfused cases that would need more than 6 GB are not run: their figure is computed, with the c of the
   largest case that was measured, and marked.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.labels import SoftLabels
from softcache.losses import distillation_loss
from softcache.losses.fused import fused_distillation_loss
from softcache.runtime.logging import log_info
from softcache.stages.options import print_table

WIDTH, KEPT = 256, 32
HOW = {"temperature": 2.0, "alpha": 0.5}
LIMIT_BYTES = 6e9
FIRST_GUESS = 40  # bytes per logit of the unfused loss, before one was measured


class Case:
    """Hidden states, head, targets, and labels that are made up, so that no teacher's logits are held."""

    def __init__(self, num_positions: int, num_classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        kept = min(KEPT, num_classes - 1)
        self.hidden = torch.randn(num_positions, WIDTH, generator=generator).requires_grad_()
        self.weight = torch.randn(num_classes, WIDTH, generator=generator).mul_(0.05).requires_grad_()
        self.targets = torch.randint(0, num_classes, (num_positions,), generator=generator)
        first = torch.randint(0, num_classes, (num_positions, 1), generator=generator)
        probs = torch.rand(num_positions, kept + 1, generator=generator)
        log_probs = (probs / probs.sum(1, keepdim=True)).log()
        self.labels = SoftLabels(
            ids=(first + torch.arange(kept)) % num_classes,
            log_probs=log_probs[:, :kept].sort(1, descending=True).values,
            log_tail=log_probs[:, kept:],
            num_classes=num_classes,
            temperatures=(1.0,),
        )

    def cross_entropy(self) -> Tensor:
        return F.cross_entropy(self.hidden @ self.weight.T, self.targets)

    def unfused(self) -> Tensor:
        return distillation_loss(self.hidden @ self.weight.T, self.labels, self.targets, **HOW)

    def fused(self) -> Tensor:
        return fused_distillation_loss(self.hidden, self.weight, self.labels, self.targets, **HOW)


def step(case: Case, loss: Callable[[Case], Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    case.hidden.grad = case.weight.grad = None
    started = time.perf_counter()
    loss(case).backward()
    return time.perf_counter() - started


# -- time --------------------------------------------------------------------------------------------------

CONTENDERS = {"dense cross-entropy": Case.cross_entropy, "unfused": Case.unfused, "fused": Case.fused}


def bench_time(num_positions: int, num_classes: int, rounds: int) -> dict[str, dict[str, float]]:
    case = Case(num_positions, num_classes)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        for name, loss in CONTENDERS.items():
            taken = step(case, loss)
            if number > 0:  # the first round warms up
                seconds[name].append(taken)
                log_info(f"round {number}/{rounds} {name}: {1e3 * taken:,.0f} ms")
    out = {}
    for name, values in seconds.items():
        ratios = [x / base for x, base in zip(values, seconds["dense cross-entropy"], strict=True)]
        out[name] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        }
    return out


# -- memory ------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_growth_bytes(name: str, num_positions: int, num_classes: int) -> int:
    """Runs here; call it in a fresh process only, because the largest resident size never falls."""
    step(Case(64, 512), CONTENDERS[name])  # libraries and thread pools
    case = Case(num_positions, num_classes)
    before = resident_bytes()
    step(case, CONTENDERS[name])
    return resident_bytes() - before


def measure_apart(name: str, num_positions: int, num_classes: int, threads: int) -> int:
    code = (
        "import torch; from benchmarks.fused import peak_growth_bytes; "
        f"torch.set_num_threads({threads}); "
        f"print(peak_growth_bytes({name!r}, {num_positions}, {num_classes}))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    return int(done.stdout)


def bench_memory(lengths: list[int], vocabularies: list[int], threads: int) -> list[dict[str, float | bool]]:
    per_logit, largest, rows = float(FIRST_GUESS), 0, []
    for num_positions, num_classes in sorted(
        ((p, v) for p in lengths for v in vocabularies), key=lambda case: case[0] * case[1]
    ):
        log_info(f"memory: {num_positions} positions, {num_classes} classes")
        logits = num_positions * num_classes
        measured = per_logit * logits <= LIMIT_BYTES
        if measured:
            unfused = float(measure_apart("unfused", num_positions, num_classes, threads))
            if logits > largest:
                per_logit, largest = unfused / logits, logits
        else:
            unfused = per_logit * logits
        rows.append(
            {
                "positions": num_positions,
                "classes": num_classes,
                "fused_bytes": measure_apart("fused", num_positions, num_classes, threads),
                "formula_bytes": 4 * WIDTH * (num_classes + num_positions) + 8 * min(logits, 2**23),
                "unfused_bytes": unfused,
                "unfused_measured": measured,
            }
        )
    return rows


# -- command -----------------------------------------------------------------------------------------------


def print_results(results: dict) -> None:
    print_table(
        f"time: {results['shape']}, {results['threads']} threads",
        ("forward + backward", "ms", "ratio", "min", "max"),
        [
            (name, f"{1e3 * row['seconds']:,.0f}", *(f"{row[key]:.2f}" for key in ("ratio", "min", "max")))
            for name, row in results["time"].items()
        ],
    )
    megabytes = lambda x: f"{x / 1e6:,.0f}"
    print_table(
        "peak memory above the inputs, MB (growth of the resident size)",
        ("positions x classes", "fused", "by the formula", "unfused", "unfused / fused"),
        [
            (
                f"{row['positions']} x {row['classes']}",
                megabytes(row["fused_bytes"]),
                megabytes(row["formula_bytes"]),
                megabytes(row["unfused_bytes"]) + ("" if row["unfused_measured"] else " (computed)"),
                f"{row['unfused_bytes'] / max(1, row['fused_bytes']):,.1f}",
            )
            for row in results["memory"]
        ],
        note="fused = 4 D (V + P) + 8 chunk V bytes, chunk V = min(P V, 2^23); unfused = c P V bytes; "
        "computed: not measured, with the c of the largest measured case",
    )


@click.command()
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch [default: torch's own].")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
def main(rounds: int, threads: int | None, json_path: str | None, quick: bool) -> None:
    """Measure the time and the peak memory of the fused loss through a language model's head."""
    before = torch.get_num_threads()
    threads = threads or before
    num_positions, num_classes = (64, 512) if quick else (1024, 32_768)
    lengths = [64] if quick else [1024, 4096, 16_384]
    vocabularies = [512] if quick else [32_768, 131_072, 262_144]
    torch.set_num_threads(threads)
    try:
        results = {
            "shape": f"P = {num_positions}, D = {WIDTH}, V = {num_classes}, K = {KEPT}",
            "threads": threads,
            "time": bench_time(num_positions, num_classes, rounds),
            "memory": bench_memory(lengths, vocabularies, threads),
        }
    finally:
        torch.set_num_threads(before)
    print_results(results)
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
