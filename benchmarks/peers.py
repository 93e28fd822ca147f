"""The peers' own code and ours: codecs, loaders, losses, and whether an import reads what their writers wrote.

    python -m benchmarks.peers --distillkit DIR --megatron DIR --tinyvit DIR --timm --liger DIR [--rounds N] [--json FILE]

Each DIR is a checkout of yours (git clone): arcee-ai/DistillKit, NVIDIA/Megatron-LM, microsoft/Cream; of Liger-Kernel the
folder of the package, `src` in its checkout; timm is installed. A peer without its option is left out, and one that does not
run here has a line with the reason. Megatron-LM needs zstandard.

1. imports: files of their writers are read by their readers and by `softcache import`: the same ids and log-probabilities,
   or the benchmark fails. Megatron-LM's files name no samples, so they cannot be imported.
2. codecs: the same rows to files by their writer and ours, and back by their reader and ours. KL is true || decoded over the
   kept classes and the rest at T = 1; a peer's rest is what is left of 1. Ours has a tail on a grid, statistics and the
   ground truth as well.
3. loaders: an epoch of the same labels by their loader in their order, by the layout of theirs that `benchmarks.reading`
   makes, and by ours. What the first batch of a peer holds is compared with the cache.
4. losses: timm's training step with a live teacher and ours from a cache, timed; Liger's losses in Triton's interpreter, for
   their numbers alone.

Rates are the best of interleaved rounds, in wall time and in CPU time of this process and all that it starts: a neighbor can
only slow a round down. Ratios are to the first row.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.codecs import CHUNK_ROWS, Stored, divergence, labels_of
from benchmarks.harness import best, machine
from benchmarks.made_labels import MadeImages, MadeSource, made_tokens
from benchmarks.peer_code import (
    MICRO_BATCH,
    DistillKit,
    Megatron,
    PeerError,
    TinyVit,
    commit_of,
    micro_batches,
)
from benchmarks.peer_losses import liger_differences, timm_steps
from benchmarks.reading import made_images, made_text
from benchmarks.reading_contenders import Contender, Labels, Made, loaders, peer_loaders
from benchmarks.synthetic_logits import image_logits, text_logits
from softcache.cache.codecs import CODECS, OpenCodec, PackedCodec
from softcache.labels import SoftLabels
from softcache.labels.tail import log_sum_exp
from softcache.reader.open import open_cache
from softcache.runtime.logging import log_info
from softcache.stages.options import print_table
from softcache.teacher.capture.plan import CaptureSettings
from softcache.tools.import_caches import import_cache, open_original

__all__ = ["check_import", "codec_row", "main", "race"]

PEERS: dict[str, type[Any]] = {"megatron": Megatron, "distillkit": DistillKit, "tinyvit": TinyVit}
WORKERS = {"images": (0, 1, 2), "text": (0, 1)}
LOSS_DIFFERENCE = 1e-4

Row = dict[str, Any]


def race(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, Row]:
    """Returns rates and their ratios to the first of them."""
    return ratios(best(runs, rounds))


def ratios(rates: dict[str, tuple[float, float]]) -> dict[str, Row]:
    wall, cpu = next(iter(rates.values()))
    return {
        name: {"per_second": w, "per_cpu_second": c, "ratio": w / wall, "cpu_ratio": c / cpu}
        for name, (w, c) in rates.items()
    }


def show_rates(title: str, rows: dict[str, Row], unit: str = "rows") -> None:
    cells = [
        (
            name,
            *(f"{row[key]:,.0f}" for key in ("per_second", "per_cpu_second")),
            *(f"{row[key]:.2f}" for key in ("ratio", "cpu_ratio")),
        )
        for name, row in rows.items()
    ]
    print_table(title, ("", f"{unit}/s", f"{unit}/CPU s", "ratio", "CPU ratio"), cells)


# -- imports -----------------------------------------------------------------------------------------------


def check_import(name: str, peer: Any, folder: Path) -> float:
    """Returns the largest difference, in nats, of what the peer's reader and an imported cache give of the peer's files.

    Raises:
        PeerError: ids differ, or log-probabilities by more than float32 and the rounding of a curve explain.
    """
    if name == "distillkit":
        data, expected = _distillkit_files(peer, folder)
    else:
        data, expected = _tinyvit_files(peer, folder)
    # Units below the number of rows whose labels an import compares with the ground truth, which is made up here.
    settings = CaptureSettings(
        unit_samples=1 if name == "distillkit" else 64,
        chunk_samples=1 if name == "distillkit" else 64,
        codec=CODECS.get("open").settings(name="open", values="float32"),
    )
    cache, _ = import_cache(
        open_original(name, [folder / "files"], data),
        data,
        str(folder / "cache"),
        settings=settings,
        model_name="made",
    )
    labels = cache.read(np.arange(len(cache)))
    found, theirs = (_by_id(*rows) for rows in ((labels.ids, labels.log_probs), expected))
    if not np.array_equal(found[0], theirs[0]):
        raise PeerError(f"{peer.name}: an import gives other ids than its own reader")
    apart = float(np.abs(found[1] - theirs[1]).max())
    if apart > 1e-3:
        raise PeerError(f"{peer.name}: an import is {apart:.1e} nats from what its own reader gives")
    return apart


def _by_id(ids_PK: np.ndarray, log_probs_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order_PK = np.argsort(ids_PK, axis=1)
    return np.take_along_axis(ids_PK.astype(np.int64), order_PK, 1), np.take_along_axis(
        log_probs_PK.astype(np.float64), order_PK, 1
    )


def _distillkit_files(peer: DistillKit, folder: Path) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    num_classes, k, rows = peer.compressor.config.d, peer.compressor.config.k, 64
    data = made_tokens(folder / "tokens", 6, rows=rows, vocab_size=num_classes)
    labels = labels_of(text_logits(6 * rows, num_classes, bfloat16=True), k)
    peer.write(folder / "files", _documents(data.source, labels, 6))
    (batch,) = peer.loader(folder / "files", 6, 0, shuffle=False)
    ids, log_probs = peer.decode(batch)
    # An import cuts curves that go too high: no log-probability above 0, no sum above 1.
    log_probs = np.minimum(log_probs.astype(np.float64), 0.0)
    return data, (ids, log_probs - np.maximum(log_sum_exp(log_probs), 0.0)[:, None])


def _tinyvit_files(peer: TinyVit, folder: Path) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    data = MadeImages(256, 64)
    labels = labels_of(image_logits(256, 64), peer.k)
    peer.write(folder / "files", data.source.keys(), labels.ids, labels.log_probs)
    items = peer.dataset(folder / "files", data.source)
    ids, probs = (np.stack([items[sample][1][part] for sample in range(256)]) for part in (0, 1))
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs.astype(np.float64))
    kept = log_probs > -np.inf
    return data, (np.where(kept, ids, 64), log_probs)


def _documents(source: Any, labels: SoftLabels, samples: int) -> Iterator[tuple[np.ndarray, ...]]:
    rows = len(labels) // samples
    for sample in range(samples):
        part = labels.take(slice(sample * rows, (sample + 1) * rows))
        yield source.sample(sample).tokens, part.ids, part.log_probs


# -- codecs ------------------------------------------------------------------------------------------------


def codec_row(labels: SoftLabels, ids_PK: np.ndarray, log_probs_PK: np.ndarray, num_bytes: int) -> Row:
    """Returns bytes of a row and KL of what came back without a tail; ids are those that were written."""
    if not np.array_equal(np.sort(ids_PK, axis=1), np.sort(labels.ids, axis=1)):
        raise PeerError("other ids came back than were written")
    _, log_probs = _by_id(ids_PK, log_probs_PK)
    place_PK = np.argsort(np.argsort(labels.ids, axis=1), axis=1)
    log_probs_PK = np.take_along_axis(log_probs, place_PK, 1)
    left_P = np.log(np.maximum(1.0 - np.exp(log_probs_PK).sum(axis=1), 1e-12))
    found = divergence(labels, log_probs_PK, left_P, 1.0)
    return {
        "bytes": num_bytes / len(labels),
        "kl_mean": float(found.mean()),
        "kl_max": float(found.max()),
    }


def our_codecs(
    labels: SoftLabels, folder: Path
) -> dict[str, tuple[Callable[[], int], Callable[[], int], Row]]:
    """Returns by name what writes all rows, what reads them, and bytes and KL."""
    common, out = (labels.num_classes, labels.k, labels.temperatures), {}
    for name, codec in (("packed, the default", PackedCodec(*common)), ("open, float16", OpenCodec(*common))):
        stored = Stored(str(folder / name[:4]), codec, len(labels))

        def write(stored: Stored = stored) -> int:
            stored.write(stored.codec.encode(labels))
            return len(labels)

        num_bytes = stored.write(codec.encode(labels))
        columns = stored.columns()
        back, arrays = codec.decode(columns), codec.unpack(columns)
        found = divergence(labels, back.log_probs, back.log_tail[:, labels.temperatures.index(1.0)], 1.0)
        measured = {"kl_mean": float(found.mean()), "kl_max": float(found.max())}
        out[f"softcache, {name}"] = (
            write,
            partial(stored.read_to, arrays),
            {"bytes": num_bytes / len(labels), **measured},
        )
    return out


def size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def distillkit_codec(
    peer: DistillKit, labels: SoftLabels, folder: Path
) -> dict[str, tuple[Callable[[], int], Callable[[], int], Row]]:
    samples = max(1, len(labels) // 512)
    source = made_tokens(
        folder / "tokens", samples, rows=len(labels) // samples, vocab_size=labels.num_classes
    ).source
    batch = peer.encode(labels.ids, labels.log_probs)
    num_bytes = sum(value.numel() for value in batch.values())

    def encode() -> int:
        return int(peer.encode(labels.ids, labels.log_probs)["compressed_logprobs"].shape[1])

    def write() -> int:
        peer.write(folder / "files", _documents(source, labels, samples))
        return len(labels)

    def read() -> int:
        return sum(len(peer.decode(batch)[0]) for batch in peer.loader(folder / "files", 4, 0))

    memory = codec_row(labels, *peer.decode(batch), num_bytes)
    write()
    (all_of,) = peer.loader(folder / "files", samples, 0, shuffle=False)
    files = codec_row(labels, *peer.decode(all_of), size_of(folder / "files", "*.parquet"))
    return {
        "DistillKit, its Parquet files": (write, read, files),
        "DistillKit, its compressor alone": (encode, lambda: len(peer.decode(batch)[0]), memory),
    }


def megatron_codec(
    peer: Megatron, labels: SoftLabels, folder: Path
) -> dict[str, tuple[Callable[[], int], Callable[[], int], Row]]:
    parts = [labels.take(slice(start, start + CHUNK_ROWS)) for start in range(0, len(labels), CHUNK_ROWS)]

    def write() -> int:
        peer.write(folder, ([(part.ids[:, None], part.log_probs[:, None])] for part in parts))
        return len(labels)

    def read() -> int:
        return sum(len(values[0]) for values, _ in peer.read(folder))

    write()
    values, ids = (
        np.concatenate([part[side][0][:, 0].float().numpy() for part in peer.read(folder)]) for side in (0, 1)
    )
    row = codec_row(labels, ids.astype(np.int64), values, size_of(folder, "*.tar"))
    return {"Megatron-LM, its tar": (write, read, row)}


def tinyvit_codec(
    peer: TinyVit, labels: SoftLabels, folder: Path
) -> dict[str, tuple[Callable[[], int], Callable[[], int], Row]]:
    source = MadeSource(len(labels), labels.num_classes)
    keys = source.keys()

    def write() -> int:
        peer.write(folder, keys, labels.ids, labels.log_probs)
        return len(labels)

    write()
    items = peer.dataset(folder, source)

    def read() -> int:
        items.set_epoch(0)
        return len([items._get_saved_logits(key) for key in keys])

    found = [items._get_saved_logits(key) for key in keys]
    ids, probs = (np.stack([item[part] for item in found]) for part in (1, 2))
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs.astype(np.float32))
    row = codec_row(labels, ids, log_probs, size_of(folder, "logits*/*-values.bin"))
    return {"TinyViT, its TxtManager": (write, read, row)}


CODEC_RUNS: dict[str, Callable[..., Any]] = {
    "distillkit": distillkit_codec,
    "megatron": megatron_codec,
    "tinyvit": tinyvit_codec,
}


def measure_codecs(title: str, labels: SoftLabels, peers: dict[str, Any], rounds: int) -> dict[str, Row]:
    with tempfile.TemporaryDirectory() as name:
        runs = our_codecs(labels, Path(name))
        for peer, code in peers.items():
            runs |= CODEC_RUNS[peer](code, labels, Path(name, peer))
        written = race({name: write for name, (write, _, _) in runs.items()}, rounds)
        read = race({name: read for name, (_, read, _) in runs.items()}, rounds)
    rows = {
        name: measured | {"write": written[name], "read": read[name]} for name, (*_, measured) in runs.items()
    }
    cells = [
        (
            name,
            f"{row['bytes']:.1f}",
            f"{row['kl_mean']:.1e}",
            f"{row['kl_max']:.1e}",
            *(
                f"{row[way][what]:{form}}"
                for way in ("write", "read")
                for what, form in (("per_second", ",.0f"), ("per_cpu_second", ",.0f"), ("cpu_ratio", ".3f"))
            ),
        )
        for name, row in rows.items()
    ]
    columns = ("", "bytes", "KL mean", "KL max", "write/s", "/CPU s", "ratio", "read/s", "/CPU s", "ratio")
    print_table(title, columns, cells)
    return rows


# -- loaders -----------------------------------------------------------------------------------------------


def tinyvit_loader(peer: TinyVit, made: Made, workers: int) -> Contender:
    folder, cache = made.folder / "theirs", open_cache(made.caches["open"])
    if not folder.exists():
        labels = cache.read(np.arange(len(cache)))
        peer.write(folder, made.data.source.keys(), labels.ids, labels.log_probs)
    items = peer.dataset(folder, made.data.source)
    loader = peer.loader(items, made.batch_samples, workers)

    def epoch(number: int) -> Iterator[Any]:
        items.set_epoch(0)
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        yield from loader

    def labels_of_batch(batch: Any) -> Labels:
        ids, probs, seeds = (values.numpy() for values in batch[1])
        return Labels(seeds.astype(np.int64), ids, np.log(probs.astype(np.float32)))

    return Contender("TinyViT, its own code", epoch, lambda batch: len(batch[1][0]), labels_of_batch)


def megatron_loader(peer: Megatron, made: Made, workers: int) -> Contender:
    folder, cache = made.folder / "megatron", open_cache(made.caches["open"])
    if not folder.exists():
        peer.write(folder, micro_batches(cache, len(cache)))
    loader = peer.loader(folder, workers)

    def rows(batch: Any) -> int:
        return sum(values.shape[0] * values.shape[1] for values in batch[0])

    def labels_of_batch(batch: Any) -> Labels:
        flat = [
            torch.cat([part.transpose(0, 1).flatten(0, 1) for part in side]).numpy()
            for side in (batch[1], batch[0])
        ]
        return Labels(np.arange(MICRO_BATCH * len(batch[0])), *flat)

    return Contender(
        "Megatron-LM, its own code, in order", lambda number: iter(loader), rows, labels_of_batch
    )


def distillkit_loader(peer: DistillKit, made: Made, workers: int) -> Contender:
    folder, cache = made.folder / "distillkit", open_cache(made.caches["open"])
    if not folder.exists():
        labels = cache.read(np.arange(made.peer_samples))
        peer.write(folder, _documents(made.data.source, labels, made.peer_samples))
    loader = peer.loader(folder, made.batch_samples, workers)
    known = {made.data.source.sample(number).tokens.tobytes(): number for number in range(made.peer_samples)}

    def epoch(number: int) -> Iterator[Any]:
        for batch in loader:
            yield batch["input_ids"], *peer.decode(batch)

    def labels_of_batch(batch: Any) -> Labels:
        samples = [known[tokens.astype(np.int32).tobytes()] for tokens in batch[0].numpy()]
        return Labels(np.array(samples), batch[1], batch[2])

    return Contender("DistillKit, its own code", epoch, lambda batch: len(batch[1]), labels_of_batch)


LOADERS: dict[str, tuple[str, Callable[..., Contender], float]] = {
    "tinyvit": ("images", tinyvit_loader, 2e-3),
    "megatron": ("text", megatron_loader, 1e-2),
    "distillkit": ("text", distillkit_loader, 1.0),
}
"""By option: the kind of labels, the loader, and nats that its precision explains."""


def check_labels(contender: Contender, made: Made, near: float) -> None:
    """Compares the first batch of a peer with the cache.

    Raises:
        PeerError: it is of other labels.
    """
    batch = contender.labels(next(iter(contender.epoch(0))))
    expected = open_cache(made.caches["open"]).read(batch.samples)
    (ids, theirs), (ours_ids, ours) = (_by_id(rows.ids, rows.log_probs) for rows in (batch, expected))
    if not np.array_equal(ids, ours_ids):
        raise PeerError(f"{contender.name}: other ids than the cache has of these samples")
    likely = ours > -9.0  # float16 probabilities run out of bits below
    apart = float(np.abs(theirs - ours, where=likely, out=np.zeros_like(ours)).max())
    if apart > near:
        raise PeerError(f"{contender.name}: {apart:.1e} nats from the cache; expected at most {near}")


def measure_loaders(kind: str, made: Made, peers: dict[str, Any], rounds: int) -> dict[str, dict[str, Row]]:
    out = {}
    for workers in WORKERS[kind]:
        contenders = []
        for name, code in peers.items():
            contender = LOADERS[name][1](code, made, workers)
            check_labels(contender, made, LOADERS[name][2])
            contenders.append(contender)
        for rebuilt in peer_loaders(made, workers):
            if any(one.name.split(",")[0] == rebuilt.name.split(",")[0] for one in contenders):
                rebuilt.name += ", its layout read by us"
                contenders.append(rebuilt)
        contenders += loaders(made, workers, list(made.caches)[-1], full=kind == "images")
        numbers = iter(range(1_000_000))

        def run(one: Contender, numbers: Iterator[int] = numbers) -> Callable[[], int]:
            return lambda: one.run(next(numbers))

        rows = race({one.name: run(one) for one in contenders}, rounds)
        for one in contenders:
            one.close()
        title = f"{kind}, through a loader, {workers} worker{'' if workers == 1 else 's'}"
        show_rates(title, rows)
        out[title] = rows
    return out


# -- all of it ---------------------------------------------------------------------------------------------


def measure_losses(timm: bool, liger: str | None, rounds: int, quick: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if timm:
        how = {"samples": 128, "teacher_model": "timm:test_resnet"} if quick else {"samples": 1024}
        rates, apart = timm_steps(rounds=rounds, **how)  # type: ignore[arg-type]
        if apart > LOSS_DIFFERENCE:
            raise PeerError(f"timm: the losses are {apart:.1e} apart; expected at most {LOSS_DIFFERENCE}")
        rows = ratios(rates)
        show_rates(f"timm {version('timm')}, training steps", rows, "samples")
        click.echo(f"timm: its loss and ours of the same batches are {apart:.1e} apart, of their value")
        out["timm"] = {"rows": rows, "difference": apart}
    if liger is not None:
        out["Liger-Kernel"] = liger_differences(liger)
        for name, found in out["Liger-Kernel"].items():
            if isinstance(found, dict) and max(found.values()) > LOSS_DIFFERENCE:
                raise PeerError(f"{name}: {found}; expected at most {LOSS_DIFFERENCE} of the largest value")
            line = (
                found if isinstance(found, str) else ", ".join(f"{key} {x:.0e}" for key, x in found.items())
            )
            click.echo(f"{name}: {line}")
    return out


@click.command()
@click.option("--distillkit", metavar="DIR", help="A checkout of arcee-ai/DistillKit.")
@click.option("--megatron", metavar="DIR", help="A checkout of NVIDIA/Megatron-LM.")
@click.option("--tinyvit", metavar="DIR", help="A checkout of microsoft/Cream.")
@click.option("--timm", is_flag=True, help="timm, which is installed.")
@click.option("--liger", metavar="DIR", help="The folder that has the package liger_kernel.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--rows", default=4096, show_default=True, type=click.IntRange(64), help="Rows of codecs.")
@click.option(
    "--images", default=100_000, show_default=True, type=click.IntRange(1), help="Samples of images."
)
@click.option("--texts", default=512, show_default=True, type=click.IntRange(1), help="Samples of text.")
@click.option("--quick", is_flag=True, help="Small sizes and vocabulary, to see that it runs.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
def main(
    timm: bool,
    liger: str | None,
    rounds: int,
    rows: int,
    images: int,
    texts: int,
    quick: bool,
    json_path: str | None,
    **checkouts: str | None,
) -> None:
    """Measure the peers' own code and ours."""
    torch.set_num_threads(1)
    classes, k, image_k = (2048, 64, 10) if quick else (131_072, 64, 10)
    given = {name: Path(folder) for name in PEERS if (folder := checkouts[name]) is not None}
    results: dict[str, Any] = {"machine": machine(), "commits": {}, "imports": {}, "left_out": {}}

    def code_of(name: str, num_classes: int, k: int) -> Any | None:
        try:
            return PEERS[name](given[name], num_classes, k)
        except Exception as error:  # a peer's code may fail in any way as it is imported
            results["left_out"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return None

    def codes(kind: str, num_classes: int, k: int) -> dict[str, Any]:
        found = {name: code_of(name, num_classes, k) for name in given if LOADERS[name][0] == kind}
        return {name: code for name, code in found.items() if code is not None}

    for name, small in (("distillkit", (2048, 64)), ("tinyvit", (64, 8))):
        if name in given and (peer := code_of(name, *small)) is not None:
            with tempfile.TemporaryDirectory() as folder:
                apart = results["imports"][name] = check_import(name, peer, Path(folder))
            click.echo(f"{peer.name}: an import gives what its reader gives, within {apart:.1e} nats")
    texts_given, images_given = codes("text", classes, k), codes("images", 1000, image_k)
    for name, peer in {**texts_given, **images_given}.items():
        results["commits"][name] = commit_of(given[name])
        changed = f"; changed to run here: {peer.patch}" if peer.patch else ""
        click.echo(f"{peer.name}: commit {results['commits'][name] or 'not known to git'}{changed}")
    if texts_given:
        labels = labels_of(text_logits(rows, classes, bfloat16=True), k)
        title = f"text, V={classes:,}, K={k}, bfloat16 logits"
        results[title] = measure_codecs(title, labels, texts_given, rounds)
    if images_given:
        title = f"images, V=1,000, K={image_k}"
        labels = labels_of(image_logits(2 * rows, 1000), image_k)
        results[title] = measure_codecs(title, labels, images_given, rounds)
    with tempfile.TemporaryDirectory() as folder:
        if images_given:
            log_info("images: writing the layouts")
            made = made_images(Path(folder, "images"), 2048 if quick else images)
            results |= measure_loaders("images", made, codes("images", 1000, 16), rounds)
        if texts_given:
            log_info("text: writing the layouts")
            made = made_text(Path(folder, "text"), 64 if quick else texts, num_classes=classes, k=k)
            results |= measure_loaders("text", made, texts_given, rounds)
    results |= measure_losses(timm, liger, rounds, quick)
    for name, why in results["left_out"].items():
        click.echo(f"{name}: left out: {why}")
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
