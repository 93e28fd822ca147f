"""A second reader of caches, from docs/format.md alone: slow, obvious, and nothing of softcache in it.

rows = read(folder)                          # {(view, sample): {column: [rows, ...]}} of what is finished
tail_at(codec, row, 3.0)                     # log of the tail's mass between the temperatures of the grid
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr

from tests.support import plain_packed

KNOWN_FEATURES = {"array_codecs", "tail_steps", "vectors"}


def read(folder):
    """Returns the labels of every finished (view, sample), decoded."""
    folder = Path(folder)
    stored = (folder / "manifest.json").read_bytes()
    manifest = json.loads(stored)
    unknown = set(manifest.get("features", [])) - KNOWN_FEATURES
    if manifest["format_version"] != 1 or unknown:
        raise ValueError(f"{folder}: of another version, or with features {unknown}")
    samples = folder / manifest.get("samples", "samples.parquet")
    if hashlib.sha256(samples.read_bytes()).hexdigest() != manifest["samples_sha256"]:
        raise ValueError(f"{samples}: another table")
    table = pq.ParquetFile(samples).read()
    out = {}
    for number, marker in sorted(_markers(folder, manifest).items()):
        if marker["manifest_sha256"] != hashlib.sha256(stored).hexdigest():
            raise ValueError(f"{folder}: marker {number}: of another manifest")
        for shard in marker["shards"]:
            if hashlib.sha256((folder / shard["path"]).read_bytes()).hexdigest() != shard["sha256"]:
                raise ValueError(f"{shard['path']}: damaged")
        columns = _zarr_unit if manifest["store"] == "zarr" else _parquet_unit
        for sample, row in columns(folder, manifest, marker, table):
            out[marker["view"], sample] = _decoded(manifest["codec"], row)
    return out


def _markers(folder, manifest):
    """Returns the markers of the finished units by number: single ones, and those in the newest generation of a block."""
    plan, found = manifest["plan"], {}
    num_units = -(-plan["num_samples"] // plan["unit_samples"]) * plan["num_views"]
    newest = {path.name[:5]: path for path in sorted((folder / "units" / "folded").glob("*.fold"))}
    for path in newest.values():
        found |= _folded(path.read_bytes(), manifest, folder, num_units)
    for path in (folder / "units").glob("*.json"):
        if int(path.stem) < num_units:
            found[int(path.stem)] = json.loads(path.read_text())
    return found


def _folded(data, manifest, folder, num_units):
    if data[-8:] != b"SOFTFOLD":
        raise ValueError("not a block")
    length = int.from_bytes(data[-12:-8], "little")
    header = json.loads(data[-44 - length : -44])
    first, m, columns = header["block"] * 32_768, header["num_units"], header["columns"]
    n = min(num_units - first, 32_768)
    kind = np.dtype(
        [("num_rows", "<u8"), ("num_bytes", "<u8", (len(columns),)), ("sha256", "u1", (len(columns), 32))]
    )
    start, pages = m * kind.itemsize, 32 * -(-m // 256)
    bitmap = data[start : start + -(-n // 8)]
    if len(data) != start + len(bitmap) + pages + length + 44:
        raise ValueError("a block of another size")
    if hashlib.sha256(data[start:-44]).digest() != data[-44:-12]:
        raise ValueError("a damaged block")
    records = np.frombuffer(data[:start], kind)
    numbers = np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little"))
    plan = manifest["plan"]
    per_view, out = -(-plan["num_samples"] // plan["unit_samples"]), {}
    for number, record in zip((numbers + first).tolist(), records, strict=True):
        view, place = divmod(number, per_view)
        start = place * plan["unit_samples"]
        digests = [bytes(digest).hex() for digest in record["sha256"]]
        out[number] = {
            "view": view,
            "start": start,
            "stop": min(start + plan["unit_samples"], plan["num_samples"]),
            "num_rows": int(record["num_rows"]),
            "manifest_sha256": header["manifest_sha256"],
            "shards": [
                {
                    "column": column,
                    "sha256": digest,
                    "path": _path(manifest, folder, column, number, view, place),
                }
                for column, digest in zip(columns, digests, strict=True)
            ],
        }
    return out


def _path(manifest, folder, column, number, view, place):
    if column is None:
        return f"{manifest['data']}/{number:05d}.parquet"
    axes = json.loads((folder / manifest["data"] / column / "zarr.json").read_text())["dimension_names"]
    start = [number] if axes[0] == "row" else [view, place]
    inner = len(axes) - len(start)
    return "/".join([manifest["data"], column, "c", *map(str, start), *["0"] * inner])


def _zarr_unit(folder, manifest, marker, table):
    names = {shard["column"] for shard in marker["shards"]}
    stored = zarr.open_group(folder / manifest["data"], mode="r")
    group = {name: stored[name][...] for name in names}
    view, plan = marker["view"], manifest["plan"]
    units = -(-plan["num_samples"] // plan["unit_samples"])
    for sample in range(marker["start"], marker["stop"]):
        if "rows" not in manifest:
            yield sample, {name: group[name][view, sample : sample + 1] for name in names}
            continue
        first = table["first_row"][sample].as_py() + view * units * manifest["rows"]["shard_rows"]
        count = table["num_rows"][sample].as_py()
        per_sample = {
            name: group[name][view, sample : sample + 1] for name in names & {"fingerprint", "num_rows"}
        }
        yield (
            sample,
            {name: group[name][first : first + count] for name in names - per_sample.keys()} | per_sample,
        )


def _parquet_unit(folder, manifest, marker, table):
    (shard,) = marker["shards"]
    rows = pq.ParquetFile(folder / shard["path"]).read()
    numbers = rows["sample"].to_numpy()
    for sample in range(marker["start"], marker["stop"]):
        (places,) = np.nonzero(numbers == sample)
        part = rows.take(places)
        row = {name: part[name].to_pylist() for name in part.column_names if name not in ("view", "sample")}
        yield sample, {name: v[:1] if name in ("fingerprint", "num_rows") else v for name, v in row.items()}


def _decoded(codec, row):
    if "record" in row:
        records = [plain_packed.decode(codec, bytes(record)) for record in row.pop("record")]
        row |= {name: [record[name] for record in records] for name in records[0]}
    return {name: np.asarray(values) for name, values in row.items()}


def vectors(codec, row, name="hidden"):
    """Returns the vectors [rows, size] of a decoded row of the codec `vectors`, number by number."""
    values = codec["vectors"][name]["values"]

    def number(stored):
        if values == "bfloat16":
            return np.array([int(stored) << 16], np.uint32).view(np.float32)[0]
        if values != "float8_e4m3":
            return float(stored)
        sign, e, m = (-1) ** (int(stored) >> 7), int(stored) >> 3 & 15, int(stored) & 7
        return sign * (2.0**-6 * m / 8 if e == 0 else 2.0 ** (e - 7) * (1 + m / 8))

    found = np.array([[number(x) for x in vector] for vector in row[name]])
    return found * row[f"{name}_scale"].astype(float)[:, None] if f"{name}_scale" in row else found


def logits(folder, row):
    """Returns what the head of a cache makes of a row's hidden states, [rows, V]; of heads in float32."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    described, codec = manifest["objects"]["head"], manifest["codec"]
    data = (Path(folder) / described["path"]).read_bytes()
    if (len(data), hashlib.sha256(data).hexdigest()) != (described["num_bytes"], described["sha256"]):
        raise ValueError(f"{described['path']}: damaged")
    length = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, about in json.loads(data[8 : 8 + length]).items():
        start, stop = (8 + length + offset for offset in about["data_offsets"])
        tensors[name] = np.frombuffer(data[start:stop], "<f4").reshape(about["shape"]).astype(float)
    found = (vectors(codec, row) @ tensors["weight"].T + tensors.get("bias", 0.0)) * codec["head"][
        "logit_scale"
    ]
    cap = codec["head"]["softcap"]
    return found if cap is None else cap * np.tanh(found / cap)


def tail_at(codec, row, temperature):
    """Returns F(1/T) of a row.

    Args:
        codec: of the manifest.
        row: `ids`, `log_probs`, `log_tail` and, where there are any, `stats`, of one row.
    """
    grid = codec["temperatures"]
    if temperature in grid:
        return float(row["log_tail"][grid.index(temperature)])
    if row["log_tail"][0] == -math.inf:
        return -math.inf
    exact = codec.get("sampling", {}).get("exact", codec["k"])
    if codec.get("stats", True):
        count = float(row["stats"][3]) - sum(p > -math.inf for p in row["log_probs"][:exact])
    else:
        count = codec["num_classes"] - sum(i < codec["num_classes"] for i in row["ids"][:exact])
    beta = 1 / temperature
    nodes = [0.0, *(1 / t for t in reversed(grid))]
    values = [math.log(max(count, 1)), *(float(x) for x in reversed(row["log_tail"]))]
    right = next(n for n, node in enumerate(nodes) if node > beta)
    left = right - 1
    near = sorted(range(len(nodes)), key=lambda n: (abs(nodes[n] - beta), -nodes[n]))[:4]
    found = 0.0
    for k in near:
        others = [nodes[j] for j in near if j != k]
        found += values[k] * math.prod((beta - b) / (nodes[k] - b) for b in others)

    def line(one, other):
        slope = (values[other] - values[one]) / (nodes[other] - nodes[one])
        return values[one] + slope * (beta - nodes[one])

    for pair in ((left - 1, left), (right, right + 1)):
        if pair[0] >= 0 and pair[1] < len(nodes):
            found = max(found, line(*pair))
    return min(found, line(left, right))
