"""Writes docs/format/: the JSON Schemas of today's models, and the test vectors if there are none yet.

    .venv/bin/python -m tests.golden.vectors

Vectors are never written again: a reader that no longer gives them is at fault. Their numbers are those of the second reader
(tests/support/plain_packed.py, plain_reader.py, plain_writer.py), of rows that softcache encoded; null stands for -inf.
"""

import json
import math

import numpy as np
import torch

from softcache.cache.codecs import OpenCodec, PackedCodec
from softcache.cache.schema import SCHEMAS
from softcache.labels import DEFAULT_TEMPERATURES
from softcache.labels.sparsify import hybrid, sample, top_k, top_p
from tests.support import plain_packed, plain_reader, plain_writer
from tests.support.caches import ROOT

FOLDER = ROOT / "docs" / "format"
SCHEMA_FILES = {name: FOLDER / f"{name}.schema.json" for name in SCHEMAS}
VECTORS = FOLDER / "vectors.json"
BETWEEN = (1.05, 1.5, 3.0, 6.0, 9.0, 40.0, 1000.0)
SHORT = (1.0, 2.0, 4.0)


def plain(value):
    """A value as JSON has it: lists, numbers, null for -inf."""
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    number = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(number, float) and number == -math.inf else number


def schema_bytes(name):
    return (json.dumps(SCHEMAS[name](), indent=2) + "\n").encode()


def labels(policy, num_classes, k, grid, rows=2):
    logits = torch.from_numpy(
        np.random.default_rng([num_classes, k]).normal(size=(rows, num_classes)) * 4
    ).float()
    logits[1, 3:] = -torch.inf  # fewer possible classes than slots
    how = {"temperatures": grid, "targets_P": torch.tensor([1, 0])}
    if policy == "sample":
        return sample(logits, draws=k, seeds_P=torch.arange(rows), **how).to_numpy()
    if policy == "hybrid":
        return hybrid(logits, k=1, draws=k - 1, seeds_P=torch.arange(rows), **how).to_numpy()
    if policy == "top_p":
        return top_p(logits, p=0.8, max_k=k, **how).to_numpy()
    return top_k(logits, k=k, **how).to_numpy()


PACKED = [
    ("top_k", 10, 4, DEFAULT_TEMPERATURES, {}),
    ("top_p", 300, 6, SHORT, {"step": 1 / 64}),
    ("top_k", 70_000, 5, SHORT, {"step": None, "tail": "float32"}),
    ("top_k", 5_000, 5, SHORT, {"tail": "float32"}),
    ("sample", 300, 6, SHORT, {}),
    ("hybrid", 300, 6, SHORT, {}),
    ("top_k", 10, 4, DEFAULT_TEMPERATURES, {"tail": "steps"}),
]


def packed_vectors():
    for policy, num_classes, k, grid, how in PACKED:
        made = labels(policy, num_classes, k, grid)
        codec = PackedCodec(num_classes, made.k, grid, sampling=made.sampling, **how)
        described = json.loads(json.dumps(codec.to_dict()))
        for record in codec.encode(made)["record"]:
            decoded = {
                name: plain(value) for name, value in plain_packed.decode(described, bytes(record)).items()
            }
            yield {"codec": described, "record": bytes(record).hex(), "decoded": decoded}


def tail_vectors():
    for num_classes, k, grid in (
        (10, 4, DEFAULT_TEMPERATURES),
        (5_000, 3, DEFAULT_TEMPERATURES),
        (300, 2, SHORT),
        (10, 1, (1.0,)),
    ):
        made = labels("top_k", num_classes, k, grid)
        codec = json.loads(json.dumps(OpenCodec(num_classes, k, grid, values="float32").to_dict()))
        for number in range(2):
            row = {name: getattr(made, name)[number] for name in ("ids", "log_probs", "log_tail", "stats")}
            found = [[t, plain(plain_reader.tail_at(codec, row, t))] for t in BETWEEN]
            yield {
                "codec": codec,
                "row": {name: plain(value) for name, value in row.items()},
                "log_tail_at": found,
            }


def fingerprint_vectors():
    contents = [
        ("digits/train/0", 0, np.arange(12, dtype=np.uint8).reshape(1, 3, 4)),
        ("digits/train/0", 3, np.arange(12, dtype=np.uint8).reshape(1, 3, 4)),
        ("schlüssel", 0, np.array([[5, 6, 7], [1, 1, 0]], np.int32)),
    ]
    for key, view, content in contents:
        yield {
            "key": key,
            "view": view,
            "dtype": content.dtype.name,
            "shape": list(content.shape),
            "values": content.reshape(-1).tolist(),
            "fingerprint": str(plain_writer.fingerprint(key, view, content)),  # above 2^53
        }


def vectors():
    return {
        "about": "docs/format.md of softcache; null is -inf; floats are exact in binary64",
        "fingerprints": list(fingerprint_vectors()),
        "packed": list(packed_vectors()),
        "tails": list(tail_vectors()),
    }


def main():
    FOLDER.mkdir(exist_ok=True)
    for name, path in SCHEMA_FILES.items():
        path.write_bytes(schema_bytes(name))
    if not VECTORS.exists():
        VECTORS.write_text(json.dumps(vectors(), indent=1) + "\n")


if __name__ == "__main__":
    main()
