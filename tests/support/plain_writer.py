"""A second writer of caches, from docs/format.md alone: slow, obvious, and nothing of softcache in it.

    write_images(folder, "zarr", keys, targets, pixels, logits)
    write_tokens(folder, "parquet", keys, tokens, logits)

It writes what it wants to, in the order of the page: the table of samples, the manifest, metadata, and each unit with its
marker. What it cannot derive it calls foreign.
"""

import hashlib
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

GRID = [1.0, 2.0, 4.0]
WRITER = "plain_writer 0.1"


def fingerprint(key, view, content):
    name, kind = key.encode(), content.dtype.name.encode()
    data = struct.pack("<I", len(name)) + name + struct.pack("<I", view)
    data += struct.pack("<I", len(kind)) + kind + struct.pack("<I", content.ndim)
    data += struct.pack(f"<{content.ndim}Q", *content.shape) + np.ascontiguousarray(content).tobytes()
    return xxhash.xxh3_64_intdigest(data)


def labels_of(logits_PV, targets_P, k):
    """The columns of `open` in float32: the k most likely classes, and what is known of the others."""
    x = logits_PV.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    rows, num_classes = log_p.shape
    ids = np.argsort(-log_p, axis=1, kind="stable")[:, :k]
    dropped = log_p.copy()
    np.put_along_axis(dropped, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.stack([np.log(np.exp(dropped / t).sum(axis=1)) for t in GRID], axis=1)
    entropy = -(np.exp(log_p) * log_p).sum(axis=1)
    support = np.full(rows, num_classes)
    return {
        "ids": ids.astype("<u2" if num_classes <= 65535 else "<u4"),
        "log_probs": np.take_along_axis(log_p, ids, axis=1).astype("<f4"),
        "log_tail": tail.astype("<f4"),
        "target_log_prob": log_p[np.arange(rows), targets_P].astype("<f4"),
        "stats": np.stack([entropy, log_p.mean(axis=1), log_p.std(axis=1), support], axis=1).astype("<f4"),
    }


class Writer:
    """One cache of one or several views, in units of `unit_samples`, of chunks of `chunk_samples`."""

    def __init__(
        self, folder, store, kind, keys, num_classes, k, *, teacher, num_views=1, counts=None, **identity
    ):
        self.folder, self.store, self.counts, self.k = folder, store, counts, k
        self.unit_samples, self.chunk_samples, self.chunk_rows = 10, 5, 16
        self.num_samples, self.num_views = len(keys), num_views
        self.per_view = -(-len(keys) // self.unit_samples)
        self.keys, self.num_classes = keys, num_classes
        codec = {
            "name": "open",
            "num_classes": num_classes,
            "k": k,
            "temperatures": GRID,
            "values": "float32",
        }
        labels = {"policy": "top_k", "k": k, "temperatures": GRID}
        self.manifest = {
            "format_version": 1,
            "softcache_version": WRITER,
            "kind": kind,
            "identity": {
                "teacher": {"spec": teacher, "dtype": "float64"},
                "source": {"name": "given", "digest": "foreign:given arrays", "num_samples": len(keys)},
                "labels": labels,
                **identity,
            },
            "num_classes": num_classes,
            "codec": codec,
            "plan": {
                "num_samples": len(keys),
                "num_views": num_views,
                "unit_samples": self.unit_samples,
                "chunk_samples": self.chunk_samples,
            },
            "store": store,
            "data": "labels.zarr" if store == "zarr" else "parquet",
            "extensions": {"org.example.plain_writer": {"made": True}},
            "attributes": {"license": "CC0"},
        }
        if counts is not None:
            largest = max(
                counts[at : at + self.unit_samples].sum() for at in range(0, len(keys), self.unit_samples)
            )
            self.shard_rows = -(-int(largest) // self.chunk_rows) * self.chunk_rows
            self.manifest["rows"] = {
                "num_rows": int(counts.sum()),
                "shard_rows": self.shard_rows,
                "chunk_rows": self.chunk_rows,
            }

    def write(self, targets, columns, prints):
        """Writes everything.

        Args:
            targets: [N] classes, or None.
            columns: of each view, by name [rows of all samples, ...].
            prints: [view][N].
        """
        (self.folder / "units").mkdir(parents=True)
        self.columns = columns
        self.prints = [np.array(view, np.uint64) for view in prints]
        self._write_samples(targets)
        document = json.dumps(self.manifest).encode()
        (self.folder / "manifest.json").write_bytes(document)
        self.sha256 = hashlib.sha256(document).hexdigest()
        if self.store == "zarr":
            self._write_zarr()
        for number in range(self.per_view * self.num_views):
            self._write_unit(number)

    def _write_samples(self, targets):
        numbers = range(self.num_samples)
        table = {
            "key": self.keys,
            "sample": pa.array(numbers, pa.int32()),
            "target": pa.array([None] * len(self.keys) if targets is None else targets, pa.int64()),
        }
        if self.counts is not None:
            firsts = [
                sample // self.unit_samples * self.shard_rows
                + self.counts[sample // self.unit_samples * self.unit_samples : sample].sum()
                for sample in numbers
            ]
            table |= {"num_rows": pa.array(self.counts), "first_row": pa.array(firsts, pa.int64())}
        path = self.folder / "samples.parquet"
        pq.write_table(pa.table(table), path, compression="none")
        self.manifest["samples_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    def _unit(self, number):
        view, place = divmod(number, self.per_view)
        start = place * self.unit_samples
        return view, start, min(start + self.unit_samples, self.num_samples)

    def _rows(self, start, stop):
        """Which rows of all samples the samples have."""
        if self.counts is None:
            return slice(start, stop)
        return slice(int(self.counts[:start].sum()), int(self.counts[:stop].sum()))

    def _all_columns(self, view):
        per_sample = {"fingerprint": self.prints[view]}
        if self.counts is not None:
            per_sample["num_rows"] = self.counts.astype(np.uint32)
        return self.columns[view], per_sample

    def _write_zarr(self):
        group = zarr.open_group(self.folder / "labels.zarr", mode="w", attributes={"made_by": WRITER})
        names = {"ids": "rank", "log_probs": "rank", "log_tail": "temperature", "stats": "stat"}
        for name, values in {k: v for part in self._all_columns(0) for k, v in part.items()}.items():
            inner, dims = values.shape[1:], [names[name]] if values.ndim > 1 else []
            is_row = self.counts is not None and name in self.columns[0]
            if is_row:
                axes, sizes = ["row"], (self.num_views * self.per_view * self.shard_rows,)
                shards, chunks = (self.shard_rows,), (self.chunk_rows,)
            else:
                axes, sizes = ["view", "sample"], (self.num_views, self.num_samples)
                shards, chunks = (1, self.unit_samples), (1, self.chunk_samples)
            fill = self.num_classes if name == "ids" else 0 if values.dtype.kind == "u" else np.nan
            blosc = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=values.dtype.itemsize)
            array = group.create_array(
                name,
                shape=(*sizes, *inner),
                dtype=values.dtype,
                shards=(*shards, *inner),
                chunks=(*chunks, *inner),
                fill_value=fill,
                dimension_names=[*axes, *dims],
                compressors=[Crc32cCodec()] if name == "fingerprint" else [blosc, Crc32cCodec()],
                config={"write_empty_chunks": True},
            )
            for number in range(self.per_view * self.num_views):
                view, start, stop = self._unit(number)
                if is_row:
                    part = self.columns[view][name][self._rows(start, stop)]
                    first = number * self.shard_rows
                    array[first : first + self.shard_rows] = np.concatenate(
                        [part, np.full((self.shard_rows - len(part), *inner), fill, values.dtype)]
                    )
                else:
                    whole = {k: v for part in self._all_columns(view) for k, v in part.items()}[name]
                    array[view, start:stop] = whole[start:stop]

    def _write_unit(self, number):
        view, start, stop = self._unit(number)
        rows = self._rows(start, stop)
        by_row, per_sample = self._all_columns(view)
        if self.store == "zarr":
            paths = {}
            for name, values in {**by_row, **per_sample}.items():
                is_row = self.counts is not None and name in by_row
                place = [number] if is_row else [view, start // self.unit_samples]
                paths["/".join(["labels.zarr", name, "c", *map(str, place), *["0"] * (values.ndim - 1)])] = (
                    name
                )
        else:
            paths = {f"parquet/{number:05d}.parquet": None}
            counts = np.ones(stop - start, int) if self.counts is None else self.counts[start:stop]
            table = {name: pa.array(list(values[rows])) for name, values in by_row.items()}
            table |= {name: pa.array(np.repeat(v[start:stop], counts)) for name, v in per_sample.items()}
            table["sample"] = pa.array(np.repeat(np.arange(start, stop), counts))
            table["view"] = pa.array(np.full(int(counts.sum()), view))
            (self.folder / "parquet").mkdir(exist_ok=True)
            pq.write_table(pa.table(table), self.folder / f"parquet/{number:05d}.parquet", row_group_size=7)
        shards = [
            {
                "path": path,
                "column": column,
                "num_bytes": (self.folder / path).stat().st_size,
                "sha256": hashlib.sha256((self.folder / path).read_bytes()).hexdigest(),
            }
            for path, column in paths.items()
        ]
        marker = {
            "unit": number,
            "view": view,
            "start": start,
            "stop": stop,
            "num_rows": rows.stop - rows.start,
            "manifest_sha256": self.sha256,
            "shards": shards,
        }
        (self.folder / f"units/{number:05d}.json").write_text(json.dumps(marker))


def write_images(folder, store, keys, targets, pixels, logits, *, settings, teacher, k=3):
    """Writes a cache of images.

    Args:
        pixels: [view][N] uint8 [C, H, W], what the teacher saw.
        logits: [view] [N, V].
        settings: of the views, from which a student's side rebuilds them.
    """
    views = {"digest": "foreign:pixels as given", "settings": settings, "num_views": len(pixels)}
    writer = Writer(
        folder,
        store,
        "image",
        keys,
        logits[0].shape[1],
        k,
        teacher=teacher,
        num_views=len(pixels),
        views=views,
    )
    prints = [
        [fingerprint(key, v, image) for key, image in zip(keys, images, strict=True)]
        for v, images in enumerate(pixels)
    ]
    writer.write(targets, [labels_of(rows, targets, k) for rows in logits], prints)


def write_tokens(folder, store, keys, tokens, logits, *, teacher, k=3):
    """Writes a cache of documents of which every token is to be learnt.

    Args:
        tokens: [N] int32 [L].
        logits: [N] [L - 1, V], over the next token.
    """
    counts = np.array([len(document) - 1 for document in tokens])
    identity = {
        "tokenizer": {"digest": "foreign:given ids", "vocab_size": logits[0].shape[1]},
        "attention": {"digest": "inside a document"},
    }
    writer = Writer(
        folder, store, "tokens", keys, logits[0].shape[1], k, teacher=teacher, counts=counts, **identity
    )
    following = np.concatenate([document[1:] for document in tokens])
    columns = labels_of(np.concatenate(logits), following, k)
    columns["position"] = np.concatenate([np.arange(count) for count in counts]).astype(np.uint32)
    contents = [np.stack([document, np.ones_like(document)]).astype(np.int32) for document in tokens]
    prints = [fingerprint(key, 0, content) for key, content in zip(keys, contents, strict=True)]
    writer.write(None, [columns], [prints])
