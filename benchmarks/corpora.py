"""What opening a corpus takes, as it grows: tokens per second, memory, disk, by form and number of processes.

    python -m benchmarks.corpora [--megabytes 1.5] [--times 1 --times 10 --times 100] [--json FILE]

A corpus is the standard library's text in documents of about 4,000 characters, repeated; 1x is `--megabytes` of it. Each
case is a process of its own, which opens the train split once with nothing made before. Its memory is how far the anonymous
memory (RssAnon, which mapped files are no part of; Linux only) of it and of its processes rises over what it holds with
everything imported, sampled 50 times a second. CPU time is of all of them; disk, all that lies under `data_dir` afterwards.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import psutil

from benchmarks.harness import machine
from softcache.data.sources import open_source, source_settings
from softcache.data.sources.text.source import load_tokenizer
from softcache.runtime.logging import log_info
from softcache.stages.options import print_table

TOKENIZED = {"modality": "text", "tokenizer": "bpe?vocab_size=4096", "seq_len": 1024}
CHARACTERS = 4000  # of a document
FORMS = {
    "jsonl": {"name": "hf", "path": "corpus.jsonl"},
    "jsonl, 2 processes": {"name": "hf", "path": "corpus.jsonl", "tokenize_workers": 2},
    "token_stream": {"name": "token_stream", "path": "corpus.bin"},
    "megatron": {"name": "megatron", "path": "corpus"},
}


def documents(num_bytes: int) -> Iterator[str]:
    """Yields documents of about so many bytes in all, different ones."""
    texts = [
        document.text for document in source_settings({**TOKENIZED, "name": "stdlib"}).documents("train")
    ]
    text, left, turn = "".join(texts), num_bytes, 0
    while left > 0:
        for start in range(0, len(text), CHARACTERS):
            if left <= 0:
                return
            left -= CHARACTERS
            yield f"{turn} {text[start : start + CHARACTERS]}"
        turn += 1


def write_corpus(folder: Path, num_bytes: int) -> None:
    """Writes a corpus in all forms, and the tokenizer."""
    tokenizer = load_tokenizer(source_settings({**TOKENIZED, "name": "stdlib"}))
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    lengths = []
    with (folder / "corpus.jsonl").open("w") as lines, (folder / "corpus.bin").open("wb") as ids:
        batch: list[str] = []
        for text in documents(num_bytes):
            lines.write(json.dumps({"text": text}) + "\n")
            batch.append(text)
            if len(batch) == 512:
                lengths += _write_ids(ids, tokenizer, batch)
                batch = []
        lengths += _write_ids(ids, tokenizer, batch)
    with (folder / "corpus.idx").open("wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(lengths) + 1))
        index.write(np.array(lengths, "<i4").tobytes())
        index.write((np.cumsum([0, *lengths[:-1]]) * 2).astype("<i8").tobytes())
        index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def _write_ids(file, tokenizer, batch: list[str]) -> list[int]:
    encoded = tokenizer(batch)["input_ids"] if batch else []
    for tokens in encoded:
        file.write(np.array([*tokens, tokenizer.eos_token_id], "<u2").tobytes())
    return [len(tokens) + 1 for tokens in encoded]


def anonymous_bytes() -> int:
    """Returns the anonymous memory of this process and of those that it started."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (OSError, psutil.Error):
            continue
        total += sum(
            1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")
        )
    return total


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of those of its children that have ended."""
    times = psutil.Process().cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def measure(folder: Path, form: str) -> dict[str, float]:
    """Returns the figures of one case, in this process."""
    given = FORMS[form]
    table = {
        **TOKENIZED,
        **given,
        "path": str(folder / given["path"]),
        "tokenizer": str(folder / "tokenizer"),
    }
    settings = source_settings({**table, "data_dir": str(folder / "data"), "eval_share": 0.01})
    load_tokenizer(settings)
    __import__("datasets")
    before, peak, ended = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    started, cpu = time.perf_counter(), cpu_seconds()
    source = open_source(settings, split="train")
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    ended.set()
    thread.join()
    disk = sum(path.stat().st_size for path in (folder / "data").rglob("*") if path.is_file())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": source.num_tokens,
        "peak_mb": (peak[0] - before) / 1e6,
        "disk_bytes_per_token": disk / source.num_tokens,
    }


@click.command()
@click.option("--megabytes", default=1.5, show_default=True, help="Text of the corpus that is called 1x.")
@click.option("--times", multiple=True, type=int, default=(1, 10, 100), show_default=True)
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
@click.option("--case", nargs=2, hidden=True, help="Measure one form of a corpus in this folder.")
def main(
    megabytes: float, times: tuple[int, ...], json_path: str | None, case: tuple[str, str] | None
) -> None:
    """Measure what opening a corpus takes, as it grows."""
    if case:
        print(json.dumps(measure(Path(case[0]), case[1])))
        return
    figures = []
    for factor in times:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_corpus(folder, int(factor * megabytes * 1e6))
            for form in FORMS:
                command = [sys.executable, "-m", "benchmarks.corpora", "--case", name, form]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                figures.append({"form": form, "times": factor, **json.loads(done.stdout.splitlines()[-1])})
                log_info(f"{factor}x {form}: {figures[-1]}")
                shutil.rmtree(folder / "data")
    rows = [
        (
            f"{figure['form']}, {figure['times']}x",
            f"{figure['tokens']:,.0f}",
            f"{figure['tokens'] / figure['seconds']:,.0f}",
            f"{figure['tokens'] / figure['cpu_seconds']:,.0f}",
            f"{figure['peak_mb']:,.0f}",
            f"{figure['disk_bytes_per_token']:.1f}",
        )
        for figure in figures
    ]
    print_table("corpora", ("", "tokens", "tokens/s", "per CPU s", "memory MB", "disk B/token"), rows)
    if json_path:
        Path(json_path).write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
