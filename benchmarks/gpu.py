"""Everything that needs a GPU, in at most nine minutes: its tests, then labels, the student's loss and decoding.

    make gpu              or    python -m benchmarks.gpu [--write docs/benchmarks.md] [--minutes 9] [--rehearse]

1. tests: those marked `gpu`.
2. labels: a teacher of the shape of Llama 3.1 8B with random weights in bfloat16 over 4,096 tokens, with its labels over
   without (`teacher alone` makes the same logits), for each policy.
3. loss: forward and backward from hidden states [4,096, 2,048] in bfloat16 to the gradients of hidden states and head. The
   baseline is Liger's fused linear cross-entropy where liger-kernel is installed, else cross-entropy of dense logits.
4. decoding: labels of a packed cache, K = 64, to tensors on the device, over copying the same bytes from pinned memory.

Each at V = 32,000, 128,256, 151,936 and 262,144; median of interleaved rounds, and the device's peak memory over what was
held before. What no time is left for is left out and named. Figures go to DIR/gpu.json, and with --write to the page,
between its marks. --rehearse runs it on a CPU in small, kernels in Triton by its interpreter: the figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import machine
from softcache.cache.codecs import PackedCodec
from softcache.labels import SoftLabels, concat
from softcache.labels.soft_labels import ARRAYS
from softcache.labels.sparsify import label_settings, top_k
from softcache.losses.fused import fused_distillation_loss
from softcache.runtime.logging import log_info

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
K = 64
POLICIES: dict[str, dict[str, Any]] = {
    "top_k, K = 64": {"policy": "top_k", "k": K},
    "sample, 64 draws": {"policy": "sample", "num_samples": K},
    "hybrid, 32 + 32": {"policy": "hybrid", "k": K // 2, "num_samples": K // 2},
}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        teacher: spec of a model of softcache.
        tokens: of each of its samples; the student's batch has `positions`.
        decoded: label rows.
    """

    device: str = "cuda"
    vocabularies: tuple[int, ...] = (32_000, 128_256, 151_936, 262_144)
    teacher: str = "llama?width=4096&depth=32&heads=32&kv_heads=8&mlp=14336"
    samples: int = 2
    tokens: int = 2048
    positions: int = 4096
    width: int = 2048
    rounds: int = 5
    decoded: int = 2**18


REHEARSAL = Sizes("cpu", (300,), "llama?width=16&depth=1&heads=2&kv_heads=1&mlp=16", 1, 2, 2, 16, 1, 64)


@dataclass(frozen=True)
class Row:
    """A contender: seconds of the median round, its median ratio to the baseline of the same round, peak bytes."""

    name: str
    seconds: float
    ratio: float
    min: float
    max: float
    peak_bytes: int | None


def measure(contenders: dict[str, Callable[[], object]], sizes: Sizes) -> list[Row]:
    """Runs the contenders, interleaved, the first being the baseline; one round more warms up."""
    cuda = sizes.device == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int | None] = {}
    for number in range(sizes.rounds + 1):
        for name, run in contenders.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            started = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() - held
            if number > 0:
                seconds[name].append(time.perf_counter() - started)
    base = seconds[next(iter(contenders))]
    rows = []
    for name, values in seconds.items():
        ratios = [one / other for one, other in zip(values, base, strict=True)]
        rows.append(Row(name, median(values), median(ratios), min(ratios), max(ratios), peaks.get(name)))
    return rows


# -- the parts ---------------------------------------------------------------------------------------------


def run_tests(seconds: float) -> str:
    """Runs the tests marked `gpu`; returns the last line of pytest's output."""
    # To collect all tests takes a minute.
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-n0", "-m", "gpu", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not through after {seconds:.0f} s"
    lines = done.stdout.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            log_info(line)
    return lines[-1] if lines else done.stderr[-300:]


def records(num_classes: int, sizes: Sizes) -> list[Row]:
    """A teacher's time with its labels, for each policy, over its time without."""
    from benchmarks.made_labels import made_tokens
    from softcache.models.language import build_language_model
    from softcache.teacher import language

    device = torch.device(sizes.device)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = build_language_model(sizes.teacher, vocab_size=num_classes, context=sizes.tokens + 1)
    finally:
        torch.set_default_dtype(torch.float32)
    digest_weights = language.digest_weights
    language.digest_weights = lambda state: "0" * 64  # 16 GB of random numbers
    try:
        teacher = language.LanguageTeacher(
            model, spec=sizes.teacher, device=device, dtype="bfloat16", cross_documents=True
        )
    finally:
        language.digest_weights = digest_weights
    with tempfile.TemporaryDirectory() as folder:
        data = made_tokens(Path(folder, "text"), sizes.samples, rows=sizes.tokens, vocab_size=num_classes)
        batch = data.load(range(sizes.samples))

    def bare() -> None:
        for _ in teacher.chunks(batch):
            pass

    def labeled(labels: dict[str, Any]) -> None:
        teacher.label(batch, label_settings(**labels))

    runs: dict[str, Callable[[], object]] = {"teacher alone": bare}
    for name, labels in POLICIES.items():
        runs[name] = partial(labeled, labels)
    return measure(runs, sizes)


def losses(num_classes: int, sizes: Sizes) -> list[Row]:
    """The fused loss over Liger's cross-entropy, and over a dense one with a dense teacher."""
    how: dict[str, Any] = {"device": sizes.device, "dtype": torch.bfloat16}
    random = torch.Generator(sizes.device).manual_seed(0)
    hidden = torch.randn(sizes.positions, sizes.width, generator=random, **how).requires_grad_()
    weight = torch.randn(num_classes, sizes.width, generator=random, **how).mul_(0.05).requires_grad_()
    targets = torch.randint(0, num_classes, (sizes.positions,), generator=random, device=sizes.device)
    labels = made_labels(sizes.positions, num_classes, sizes.device)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    def fused(labels: SoftLabels | None, alpha: float, **more: Any) -> Callable[[], None]:
        settings = {"temperature": 2.0, "alpha": alpha} | more
        return step(lambda: fused_distillation_loss(hidden, weight, labels, targets, **settings))

    def dense_kl() -> Tensor:
        log_probs = F.log_softmax((hidden @ weight.T).float() / 2.0, dim=-1)
        return F.kl_div(log_probs, teacher, reduction="batchmean", log_target=True) * 4.0

    runs: dict[str, Callable[[], None]] = {}
    if (liger := liger_loss()) is not None:
        runs["Liger, fused linear cross-entropy"] = step(lambda: liger(weight, hidden, targets))
    runs["cross-entropy of dense logits"] = step(
        lambda: F.cross_entropy((hidden @ weight.T).float(), targets)
    )
    runs |= {
        "fused, cross-entropy alone": fused(None, 0.0),
        "fused, forward KL of K = 64": fused(labels, 1.0),
        "fused, forward KL and cross-entropy": fused(labels, 0.5),
        "fused, JSD and cross-entropy": fused(labels, 0.5, loss="jsd"),
    }
    rows = measure(runs, sizes)
    # With the baseline again, and not before: the dense teacher takes most of the memory.
    teacher = torch.randn(sizes.positions, num_classes, generator=random, **how).log_softmax(dim=-1)
    baseline = next(iter(runs))
    dense = {baseline: runs[baseline], "KL of dense logits and a dense teacher": step(dense_kl)}
    return [*rows, *measure(dense, sizes)[1:]]


def made_labels(num_positions: int, num_classes: int, device: str) -> SoftLabels:
    """Returns labels of random logits and targets, on the device."""
    random = torch.Generator(device).manual_seed(1)
    rows, parts = max(1, 2**26 // num_classes), []
    for start in range(0, num_positions, rows):
        size = (min(rows, num_positions - start), num_classes)
        logits = torch.randn(size, generator=random, device=device) * 3
        parts.append(top_k(logits, k=min(K, num_classes), targets_P=logits.argmin(dim=1)))
    return concat(parts)


def liger_loss() -> Callable[..., Tensor] | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss: Callable[..., Tensor] = LigerFusedLinearCrossEntropyLoss()
    return loss


def decoding(num_classes: int, sizes: Sizes) -> list[Row]:
    """Packed labels, decoded and moved to the device, over copying as many bytes as they have there."""
    base = made_labels(sizes.positions, num_classes, sizes.device).to_torch("cpu").to_numpy()
    labels, target = base.take(np.arange(sizes.decoded) % len(base)), torch.device(sizes.device)
    codec = PackedCodec(labels.num_classes, labels.k, labels.temperatures)
    columns = codec.encode(labels)
    decoded = codec.decode(columns)
    num_bytes = sum(x.nbytes for x in (getattr(decoded, name) for name in ARRAYS) if x is not None)
    held = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=sizes.device == "cuda")
    place = torch.empty_like(held, device=target)
    return measure(
        {
            "copy from pinned memory": lambda: place.copy_(held, non_blocking=True),
            "decode, and copy to the device": lambda: codec.decode(columns).to_torch(target),
        },
        sizes,
    )


# -- what is written ---------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[int, Sizes], list[Row]]] = {
    "teacher with its labels": records,
    "loss, forward and backward": losses,
    "decoding": decoding,
}


def table(title: str, of_vocabulary: dict[int, list[Row]]) -> str:
    """Returns a part's figures as a table of Markdown."""
    lines = [f"| {title} | V | ms | ratio | min | max | peak, MB |", "|---|--:|--:|--:|--:|--:|--:|"]
    for num_classes, rows in of_vocabulary.items():
        for row in rows:
            peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
            figures = " | ".join(f"{x:.3f}" for x in (row.ratio, row.min, row.max))
            lines.append(f"| {row.name} | {num_classes:,} | {1e3 * row.seconds:,.2f} | {figures} | {peak} |")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """Returns what stands between the marks of docs/benchmarks.md."""
    parts = [f"Measured by `make gpu` on {results['device']}; tests marked `gpu`: {results['tests']}."]
    parts += [table(title, figures) for title, figures in results["parts"].items() if figures]
    parts += [f"Not measured: {reason}." for reason in results["left_out"]]
    return "\n\n".join(parts)


def write_page(path: str, text: str) -> None:
    """Puts a text between the marks of a page.

    Raises:
        click.ClickException: the page does not have both marks, in their order.
    """
    old = Path(path).read_text()
    start, end = old.find(BEGIN), old.find(END)
    if not 0 <= start < end:
        raise click.ClickException(
            f"{path}: expected {BEGIN} and then {END}; found no such pair; add both lines"
        )
    Path(path).write_text(f"{old[: start + len(BEGIN)]}\n{text}\n{old[end:]}")


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes what there is as JSON."""
    parts = {
        title: {str(v): [asdict(row) for row in rows] for v, rows in figures.items()}
        for title, figures in results["parts"].items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results | {"parts": parts}, indent=2) + "\n")


def run(sizes: Sizes, seconds: float, path: Path) -> dict[str, Any]:
    """Runs all parts, from the smallest vocabulary, until the time is over; writes the figures after each."""
    ends, is_rehearsal = time.monotonic() + seconds, sizes.device != "cuda"
    name = "a CPU: a rehearsal" if is_rehearsal else torch.cuda.get_device_name()
    results: dict[str, Any] = {"machine": machine(), "device": name, "sizes": asdict(sizes), "left_out": []}
    results["tests"] = "not run" if is_rehearsal else run_tests(seconds / 3)
    results["parts"] = {title: {} for title in PARTS}
    slowest = 0.0
    if liger_loss() is None:
        results["left_out"].append("Liger's cross-entropy, because liger-kernel is not installed")
    for num_classes in sizes.vocabularies:
        for title, part in PARTS.items():
            if time.monotonic() + slowest >= ends:
                results["left_out"].append(f"{title} at V = {num_classes:,}, because the time was over")
                continue
            started = time.monotonic()
            try:
                results["parts"][title][num_classes] = part(num_classes, sizes)
            except torch.OutOfMemoryError:
                results["left_out"].append(f"{title} at V = {num_classes:,}, because the memory is too small")
            gc.collect()
            if not is_rehearsal:
                torch.cuda.empty_cache()
            slowest = max(slowest, time.monotonic() - started)
            log_info(f"V = {num_classes:,}: {title}, {time.monotonic() - started:.0f} s")
            save(path, results)
    save(path, results)
    return results


@contextmanager
def rehearsing() -> Iterator[Sizes]:
    """Has rows of a CPU go through the kernels, which the interpreter runs."""
    from softcache.labels.sparsify import assemble

    os.environ["TRITON_INTERPRET"] = "1"
    serves = assemble.is_one_pass
    assemble.is_one_pass = lambda logits_PV, k, temperatures: logits_PV.dtype != torch.float64
    try:
        yield REHEARSAL
    finally:
        assemble.is_one_pass = serves


@click.command()
@click.option(
    "--out", default="runs/benchmarks", show_default=True, metavar="DIR", help="Where gpu.json goes."
)
@click.option(
    "--write", "page_path", metavar="PAGE", help="Put the tables into this page, between its marks."
)
@click.option(
    "--minutes", default=9.0, show_default=True, type=click.FloatRange(0), help="Time for all of it."
)
@click.option("--rehearse", is_flag=True, help="On a CPU, in small: does it run?")
def main(out: str, page_path: str | None, minutes: float, rehearse: bool) -> None:
    """Run what needs a GPU: tests, then labels, losses and decoding."""
    if not rehearse and not torch.cuda.is_available():
        raise click.ClickException("expected a CUDA device; found none; --rehearse runs it on a CPU in small")
    with rehearsing() if rehearse else nullcontext(Sizes()) as sizes:
        results = run(sizes, 60 * minutes, Path(out, "gpu.json"))
    click.echo(page(results))
    if page_path:
        write_page(page_path, page(results))


if __name__ == "__main__":
    main()
