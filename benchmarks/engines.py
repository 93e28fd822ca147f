"""A teacher run by transformers, by vLLM as an engine, and by vLLM's server: the table of docs/how-to/large-teachers.md.

    make .venv-vllm/.installed
    .venv-vllm/bin/python -m benchmarks.engines [--samples 400] [--width 512] [--json FILE]

One model with random weights labels the pages of docs/, tokenized by a byte-pair tokenizer of them, one document to a row.
The ways run one after the other, each in a process of its own. Shown are rows per second and per CPU second of labeling,
without the start, which is a column of its own; the ratio is of CPU seconds, which other work on the machine changes less.
Memory is the peak of the proportional set size of all processes of a way, sampled every second; the difference, the largest
of a kept log-probability to that of transformers. A server gives its K most likely alone, and labels of temperature 1.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
K, SEQ_LEN, VOCAB = 20, 256, 8000
HEADER = (
    "| | rows/s | rows a CPU second | against transformers | start, s | peak memory, MB | largest difference, nats "
    "| rows with the same tokens |"
)
WAYS = {
    "transformers": 'teacher.engine = "transformers"',
    "vllm": 'teacher.engine = "vllm"',
    "server": "vLLM's server, `softcache query` and `import`",
}


def make_model(folder: Path, width: int, depth: int) -> Path:
    """Returns the folder of a Llama with random weights and a tokenizer of the repository's pages."""
    import torch
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    texts = [path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))]
    with (folder / "texts.jsonl").open("w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB, show_progress=False)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        intermediate_size=3 * width,
        max_position_embeddings=2 * SEQ_LEN,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # so that it prefers some tokens
    model.save_pretrained(folder / "model")
    wrapped.save_pretrained(folder / "model")
    return folder / "model"


def run_config(folder: Path, way: str, samples: int) -> Any:
    from softcache.config.run import RunConfig

    return RunConfig.model_validate(
        {
            "name": "engines",
            "source": {
                "modality": "text",
                "name": "hf",
                "path": str(folder / "texts.jsonl"),
                "tokenizer": str(folder / "model"),
                "seq_len": SEQ_LEN,
                "packing": "documents",
                "eval_share": 0.05,
                "max_train_samples": samples,
                "data_dir": str(folder / "data"),
            },
            "teacher": {
                "model": f"hf:{folder / 'model'}",
                "engine": "vllm" if way == "vllm" else "transformers",
            },
            "labels": {"k": K},
            "capture": {
                "device": "cpu",
                "batch_size": 16,
                "evaluate": False,
                "codec": {"name": "open", "values": "float32"},
            },
        }
    )


def label(folder: Path, way: str, samples: int) -> dict[str, float]:
    """Makes the cache of a way; returns what it took."""
    import torch

    from softcache.runs import open_data, open_teacher
    from softcache.runs.cache import prepare_cache
    from softcache.teacher.capture import capture

    torch.set_num_threads(os.cpu_count() or 1)
    config = run_config(folder, way, samples)
    data, begun = open_data(config), time.perf_counter()
    if way == "server":
        return _label_by_server(config, data, folder, begun)
    teacher = open_teacher(config, data)
    teacher.score(data.train.load(range(4)))  # compilers and allocators do what they do once
    started = time.perf_counter() - begun
    objects, manifest, digest = prepare_cache(config, data, teacher, str(folder / way))
    used = _cpu_seconds()
    report = capture(
        objects,
        manifest,
        digest,
        data=data.train,
        teacher=teacher,
        labels=config.labels,
        settings=config.capture,
    )
    return {
        "start": started,
        "rows": report.rows,
        "seconds": report.seconds,
        "cpu_seconds": _cpu_seconds() - used,
    }


def _cpu_seconds() -> float:
    """Returns the CPU time of this process and those that it has started."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(each.cpu_times()[:2]) for each in processes)


def _label_by_server(config: Any, data: Any, folder: Path, begun: float) -> dict[str, float]:
    from softcache.tools.import_logprobs import find_responses, import_labels
    from softcache.tools.query import Server, query_server

    with _server(folder / "model") as url:
        started, used = time.perf_counter() - begun, _cpu_seconds()
        asked = query_server(Server(url), data.train.source, folder / "responses.jsonl", k=K)
        used = _cpu_seconds() - used
    begun, imported = time.perf_counter(), _cpu_seconds()
    found = find_responses([folder / "responses.jsonl"], data.train.source)
    _, report = import_labels(found, data.train, str(folder / "server"), k=K, settings=config.capture)
    seconds = asked.seconds + time.perf_counter() - begun
    used += _cpu_seconds() - imported
    return {"start": started, "rows": report.rows, "seconds": seconds, "cpu_seconds": used}


@contextmanager
def _server(model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--port",
        str(port),
    ]
    command += ["--host", "127.0.0.1", "--max-logprobs", str(K), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(2 * SEQ_LEN)]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                if server.poll() is not None:
                    raise
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def measure(folder: Path, way: str, samples: int) -> dict[str, float]:
    """Returns what a way took in a process of its own, and the peak memory (MB) of its processes together."""
    import psutil

    command = [
        sys.executable,
        "-m",
        "benchmarks.engines",
        "--way",
        way,
        "--samples",
        str(samples),
        "--folder",
        str(folder),
    ]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        process = psutil.Process(child.pid)
        while not ended.wait(1.0):
            try:
                # Pages that several processes share count in each of them in proportion.
                peak = max(
                    peak,
                    sum(each.memory_full_info().pss for each in (process, *process.children(recursive=True))),
                )
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    output = child.communicate()[0]
    ended.set()
    thread.join()
    if child.returncode:
        raise click.ClickException(f"{way}: exit code {child.returncode}")
    return json.loads(output.splitlines()[-1]) | {"peak_mb": peak / 2**20}


def compare(folder: Path, way: str) -> dict[str, float]:
    """Returns the largest difference (nats) of the kept log-probabilities of a cache to those of transformers, and how many
    rows keep the same tokens."""
    import numpy as np

    from softcache.reader import open_cache

    ours, theirs = open_cache(str(folder / "transformers")), open_cache(str(folder / way))
    worst, same, rows = 0.0, 0, 0
    for sample in range(len(ours)):
        one, other = ours.read([sample]), theirs.read([sample])
        both = (np.sort(one.ids, 1) == np.sort(other.ids, 1)).all(1)
        difference = np.sort(one.log_probs, 1) - np.sort(other.log_probs, 1)
        worst = max(worst, float(np.abs(difference).max()))
        same, rows = same + int(both.sum()), rows + len(both)
    return {"difference": worst, "same_tokens": same / rows}


@click.command()
@click.option("--samples", default=400, show_default=True, help="Documents of up to 256 tokens.")
@click.option("--width", default=512, show_default=True, help="Of the model; a multiple of 128.")
@click.option("--depth", default=8, show_default=True, help="Layers of the model.")
@click.option("--json", "json_path", type=click.Path(), help="Where the figures go.")
@click.option("--way", type=click.Choice(list(WAYS)), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(
    samples: int, width: int, depth: int, json_path: str | None, way: str | None, folder: Path | None
) -> None:
    """Label one text in three ways; print the table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if way is not None:
        assert folder is not None
        click.echo(json.dumps(label(folder, way, samples)))
        return
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as made:
        make_model(Path(made), width, depth)
        for name in WAYS:
            figures[name] = measure(Path(made), name, samples)
        for name in WAYS:
            figures[name] |= compare(Path(made), name)
    click.echo(f"{platform.machine()}, {os.cpu_count()} cores; {figures['vllm']['rows']:,.0f} rows")
    click.echo(HEADER)
    click.echo("|---|--:|--:|--:|--:|--:|--:|--:|")
    base = figures["transformers"]["rows"] / figures["transformers"]["cpu_seconds"]
    for name, found in figures.items():
        rate, cpu_rate = (found["rows"] / found[key] for key in ("seconds", "cpu_seconds"))
        click.echo(
            f"| {WAYS[name]} | {rate:,.0f} | {cpu_rate:,.0f} | {cpu_rate / base:.2f} | {found['start']:.1f} "
            f"| {found['peak_mb']:,.0f} | {found['difference']:.1e} | {found['same_tokens']:.2%} |"
        )
    if json_path is not None:
        Path(json_path).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
