"""Small real caches of tokens: a few texts that the tests write, labeled by a tiny language model of a fixed seed."""

import json
import random

from softcache.config.run import RunConfig
from softcache.runs import capture_labels, open_data, open_teacher
from tests.support.tables import merged

WORDS = [
    "the",
    "teacher",
    "tells",
    "a",
    "student",
    "what",
    "it",
    "knows",
    "and",
    "one",
    "cache",
    "serves",
    "every",
    "temperature",
    "of",
    "them",
    "all",
]


def write_texts(path, num_documents=40, seed=0):
    """A JSON-lines file of documents of very different lengths."""
    draw = random.Random(seed)
    lines = [
        {"id": f"doc{number:03d}", "text": " ".join(draw.choices(WORDS, k=draw.randint(2, 60)))}
        for number in range(num_documents)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def text_config(folder, **tables) -> RunConfig:
    """A run on `folder`/texts.jsonl; tables are merged key by key."""
    if not (folder / "texts.jsonl").exists():
        write_texts(folder / "texts.jsonl")
    base = {
        "name": "test-text",
        "source": {
            "modality": "text",
            "name": "hf",
            "path": str(folder / "texts.jsonl"),
            "key_column": "id",
            "tokenizer": "bpe?vocab_size=300",
            "seq_len": 32,
            "eval_share": 0.2,
            "data_dir": str(folder / "data"),
        },
        "teacher": {"model": "tests.fakes_language:known"},
        "labels": {"k": 6},
        "capture": {
            "unit_samples": 8,
            "chunk_samples": 3,
            "batch_size": 4,
            "device": "cpu",
            "chunk_positions": 7,
        },
        "student": {"model": "llama?width=16&depth=1&heads=2"},
        "loss": {"temperature": 4.0},
        "train": {"epochs": 2, "batch_size": 6, "device": "cpu", "eval_batch_size": 4},
    }
    return RunConfig.model_validate(merged(base, tables))


def make_text_cache(url, folder, **tables):
    """Returns (config, data, cache) of a freshly captured cache."""
    config = text_config(folder, **tables)
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(url))
    return config, data, cache
