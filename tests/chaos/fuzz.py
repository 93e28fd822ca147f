"""Forged caches: documents and shards changed at random, and signed again; only softcache's own errors may come out.

    python -m tests.chaos.fuzz --examples 5000 --seed 0

Hypothesis chooses which documents change and how: a value in place of another, a key gone, doubled or new, bytes
turned, cut or put in. Most examples are signed again, so that what lies behind a checksum is met as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.chaos.forge import KINDS, Files, make_small, probe, signed, write_files

NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**48,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
]
TEXTS = [
    "",
    "/",
    "..",
    "../x",
    "/etc/passwd",
    "a\x00b",
    "C:\\x",
    "é",
    "\ud800",
    "x" * 5000,
    "tests.chaos.evil:run",
    "None",
]
odd_values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [None], {"": None}]),
    st.sampled_from(
        [float("nan"), float("inf"), 1e308, 1e-308, [1.0, 2.0], ["x"], {"policy": "every", "every": 2}]
    ),
    st.integers(-(2**70), 2**70),
    st.text(max_size=20),
    st.builds(lambda depth: _nested(depth), st.sampled_from([50, 150, 5000])),
).map(copy.deepcopy)  # an example changes what it was given


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(min(depth, 900)):
        value = [value]
    return value


def places_of(document: Any, prefix: tuple = ()) -> list[tuple]:
    """Returns where values are in a document, as tuples of keys; long lists by their first and last."""
    out = [prefix] if prefix else []
    if len(prefix) > 8:
        return out
    if isinstance(document, dict):
        for key, value in document.items():
            out += places_of(value, (*prefix, key))
    elif isinstance(document, list):
        for index in sorted({0, len(document) - 1} & set(range(len(document)))):
            out += places_of(document[index], (*prefix, index))
    return out


@st.composite
def changed_documents(draw: Any, data: bytes) -> bytes:
    """JSON with one to three values changed, dropped, doubled or added."""
    document = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        places = places_of(document)
        if not places:
            break
        *parents, key = draw(st.sampled_from(places))
        table = document
        for parent in parents:
            table = table[parent]
        act = draw(st.sampled_from(["set", "set", "set", "drop", "add", "double", "near"]))
        if act == "drop":
            del table[key]
        elif act == "add" and isinstance(table, dict):
            table[draw(st.text(max_size=8))] = draw(odd_values)
        elif act == "double" and isinstance(table, list):
            table.append(table[key])
        elif act == "near" and isinstance(table[key], int | float):
            table[key] = table[key] + draw(st.sampled_from([-1, 1, 16, -16, 0.5]))
        else:
            table[key] = draw(odd_values)
    try:
        return json.dumps(document).encode("utf-8", "surrogatepass")
    except ValueError:
        return b"{"


@st.composite
def changed_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes turned, cut, doubled, or put in; the last bytes, where indices and footers are, more often than others."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        end = len(out)
        near_end = st.integers(max(0, end - 300), max(0, end - 1))
        place = draw(
            st.one_of(st.integers(0, max(0, end - 1)), near_end, st.integers(0, min(64, max(0, end - 1))))
        )
        act = draw(st.sampled_from(["turn", "turn", "turn", "set", "cut", "insert", "drop"]))
        if act == "turn" and end:
            out[place] ^= 1 << draw(st.integers(0, 7))
        elif act == "set" and end:
            word = draw(st.sampled_from([b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"]))
            out[place : place + len(word)] = word
        elif act == "cut":
            del out[place:]
        elif act == "insert":
            out[place:place] = draw(st.binary(min_size=1, max_size=40))
        elif act == "drop":
            del out[place : place + draw(st.integers(1, 40))]
    return bytes(out)


@st.composite
def forged(draw: Any, files: Files) -> Files:
    """A cache with one or two objects changed, signed again in three cases of four."""
    out = Files(files)
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["manifest.json", "manifest.json", "units/", "samples.parquet", "", ""]))
        path = draw(st.sampled_from(sorted(path for path in files if path.startswith(kind))))
        is_json = path.endswith(".json") and draw(st.integers(0, 4)) > 0
        out[path] = draw((changed_documents if is_json else changed_bytes)(files[path]))
    return signed(out) if draw(st.integers(0, 3)) else out


def fuzz(kind: str, folder: Path, *, examples: int, number: int) -> Counter[str]:
    """Runs so many examples of one kind of cache; returns how many were refused, and how many changed nothing that is read.

    Raises whatever is not an error of softcache's own, with the example that led there.
    """
    config, data, files = make_small(kind, folder)
    root, tally, on_disk = folder / f"{kind}-forged", Counter[str](), [files]
    shutil.copytree(folder / kind, root)

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(forged(files))
    def one(changed: Files) -> None:
        write_files(root, changed, on_disk[0])
        on_disk[0] = changed
        refusals = probe(root, config, data, folder / "memmaps")
        tally["refused" if refusals else "read"] += 1

    one()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=1000, help="of each kind of cache")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(
        "| cache | forged | refused | read: nothing that is read was changed, or other numbers of the right kind |"
    )
    print("|---|--:|--:|--:|")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz(kind, Path(folder), examples=asked.examples, number=asked.seed)
        print(f"| {kind} | {tally.total():,} | {tally['refused']:,} | {tally['read']:,} |", flush=True)


if __name__ == "__main__":
    main()
