"""What a language teacher needs at its peak, from tokens to label records, as sequences grow.

    python -m benchmarks.teacher_memory [--length 2048 --length 8192 …] [--vocabulary 262144] [--json FILE]

A one-layer model of width 64 labels one document of L tokens; each case runs in a process of its own, and the figure is
how far the process's resident size rises (VmHWM, reset through /proc/self/clear_refs; Linux only) over what it holds with
the model built and a short document labeled. Logits of a whole document would be 4 L V bytes; the head works on chunks of
about 2^23 logits instead, and the rest grows by the backbone's activations and the records alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import torch

from benchmarks.fused import resident_bytes
from softcache.data.tokens import TokenBatch
from softcache.labels.sparsify import TopK
from softcache.models.language import build_language_model
from softcache.stages.options import print_table
from softcache.teacher.language import LanguageTeacher


def document(length: int, vocab_size: int) -> TokenBatch:
    tokens = torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    rows, numbers = torch.arange(length - 1), torch.zeros(1, dtype=torch.int64).numpy()
    return TokenBatch(
        tokens=tokens,
        segments=torch.zeros_like(tokens),
        rows=rows,
        targets=tokens[0, 1:],
        lengths=numbers + length,
        row_counts=numbers + length - 1,
        samples=numbers,
        view=0,
        fingerprints=numbers.astype("uint64"),
    )


def peak_growth_bytes(length: int, vocab_size: int) -> int:
    model = build_language_model("llama?width=64&depth=1&heads=2", vocab_size=vocab_size, context=length)
    teacher = LanguageTeacher(model, spec="llama", device=torch.device("cpu"), dtype="float32")
    settings = TopK(k=32)
    teacher.label(document(64, vocab_size), settings)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = resident_bytes()
    teacher.label(document(length, vocab_size), settings)
    return resident_bytes() - before


@click.command()
@click.option("--length", "lengths", multiple=True, type=int, default=(2048, 8192, 32768), show_default=True)
@click.option("--vocabulary", "vocab_size", default=262_144, show_default=True)
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
def main(lengths: tuple[int, ...], vocab_size: int, json_path: str | None) -> None:
    """Measure the peak memory of a language teacher against the length of a document."""
    rows = []
    for length in lengths:
        code = (
            f"from benchmarks.teacher_memory import peak_growth_bytes as f; print(f({length}, {vocab_size}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rows.append({"length": length, "vocabulary": vocab_size, "peak_bytes": int(done.stdout)})
    print_table(
        "peak memory of the teacher above its weights",
        ("tokens", "vocabulary", "peak MB", "logits of the document, MB"),
        [
            (
                f"{r['length']:,}",
                f"{vocab_size:,}",
                f"{r['peak_bytes'] / 1e6:,.0f}",
                f"{r['length'] * vocab_size * 4 / 1e6:,.0f}",
            )
            for r in rows
        ],
    )
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
