"""The invariants that a unit's rows break: those of their places, then those of their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from softcache.cache.codecs import Codec, SoftLabelCodec
from softcache.cache.codecs.bernoulli import BernoulliCodec
from softcache.cache.codecs.detection import CellCodec
from softcache.cache.codecs.precision import EXACT, HALF, Error
from softcache.cache.codecs.vectors import VectorCodec, vector_faults
from softcache.cache.invariants.catalog import Violation, first_violation
from softcache.cache.invariants.independent import independent_violations
from softcache.cache.invariants.soft_labels import RowFacts, slot_violations, soft_label_violations
from softcache.cache.manifest import Manifest

__all__ = ["broken_invariants"]

CHUNK_NUMBERS = 2**18
"""Log-probabilities that are looked at together: what is computed from them stays in the processor's cache."""
LARGEST = ("top_k", "top_p", "dense", "hybrid")
"""Policies that keep the likeliest classes in their exact slots."""
COARSEST_INPUT = Error(4.0, 2.0**-11)
"""Of the caches that a fused one is made of: their codecs are not in its manifest, and no step is above 8 nats."""
SERVED_MASS = 1e-3
"""How far from 1 the probabilities of a server's answer may add up; see docs/format.md."""


def broken_invariants(
    manifest: Manifest,
    arrays: Mapping[str, np.ndarray],
    counts_B: np.ndarray,
    targets_B: np.ndarray | None = None,
) -> Iterator[Violation]:
    """Yields the invariants from I11 on that a unit's rows break, each once, with the first row at fault.

    Args:
        arrays: the unit's unpacked columns by name.
        counts_B: rows of each sample, by the table of samples.
        targets_B: ground truth of each sample, -1 where there is none; None where it is not known.
    """
    yield from _places(manifest, arrays, counts_B)
    codec = manifest.build_codec()
    targets_P = None if targets_B is None else np.repeat(targets_B, counts_B)
    num_rows = int(counts_B.sum())
    found: dict[str, Violation] = {}
    size = max(1, CHUNK_NUMBERS // max(1, codec.k))
    names = [name for name in arrays if name not in ("fingerprint", "num_rows", "position")]
    for start in range(0, num_rows, size):
        part = slice(start, start + size)
        for violation in _labels(
            manifest,
            codec,
            {name: arrays[name][part] for name in names},
            None if targets_P is None else targets_P[part],
        ):
            first = found.setdefault(
                violation.number, violation._replace(row=start + violation.row, num_rows=0)
            )
            found[violation.number] = first._replace(num_rows=first.num_rows + violation.num_rows)
    if "cells" in arrays and not found:
        found |= {violation.number: violation for violation in _cells(arrays["cells"], counts_B)}
    yield from (found[number] for number in sorted(found, key=lambda number: int(number[1:])))


def _labels(
    manifest: Manifest, codec: Codec, arrays: Mapping[str, np.ndarray], targets_P: np.ndarray | None
) -> list[Violation]:
    if isinstance(codec, BernoulliCodec):
        return independent_violations(arrays, codec.num_classes, codec.precision.log_probs)
    if isinstance(codec, CellCodec):
        return _cell_rows(codec, arrays)
    if isinstance(codec, VectorCodec):
        return [
            violation
            for name, wrong, expected in vector_faults(codec, arrays)
            for violation in first_violation("I95", wrong, name, arrays[name], expected)
        ]
    if not isinstance(codec, SoftLabelCodec):
        codec.validate(arrays)
        return []
    facts = _facts(manifest, codec)
    if facts is None:
        codec.validate(arrays)
        return slot_violations(codec, arrays)
    return soft_label_violations(codec, arrays, facts, targets_P)


def _facts(manifest: Manifest, codec: SoftLabelCodec) -> RowFacts | None:
    """Returns what a manifest states of its rows; None where the codec states no error."""
    if codec.precision is None:
        return None
    policy, is_fused = manifest.identity["labels"]["policy"], "fusion" in manifest.identity
    return RowFacts(
        codec.precision,
        takes_largest=policy in LARGEST and not is_fused,
        is_exact_target=not is_fused,
        moved=COARSEST_INPUT if is_fused else HALF if manifest.slimmed_from else EXACT,
        mass=SERVED_MASS if policy == "imported" else 0.0,
        lacks_targets=policy == "imported",
    )


def _cell_rows(codec: CellCodec, arrays: Mapping[str, np.ndarray]) -> list[Violation]:
    cells, out = arrays["cells"], []
    wrong = (cells < 0) | (cells >= codec.num_cells)
    out += first_violation("I90", wrong, "cells", cells, f"0 to {codec.num_cells - 1}")
    for name, _ in codec.head_columns:
        values = arrays[name].reshape(len(cells), -1)
        out += first_violation("I91", ~np.isfinite(values), name, values, "a finite number")
    if codec.distribution == "bernoulli":
        return out + independent_violations(arrays, codec.num_classes, codec.precision.log_probs)
    return out + soft_label_violations(codec.softmax, arrays, RowFacts(codec.precision))


def _cells(cells_P: np.ndarray, counts_B: np.ndarray) -> list[Violation]:
    sample_P = np.repeat(np.arange(len(counts_B)), counts_B)
    order_P = np.lexsort((cells_P, sample_P))
    again = (np.diff(cells_P[order_P]) == 0) & (np.diff(sample_P[order_P]) == 0)
    wrong_P = np.zeros(len(cells_P), bool)
    wrong_P[order_P[1:][again]] = True
    return first_violation("I90", wrong_P, "cells", cells_P, "each cell once in a sample")


def _places(
    manifest: Manifest, arrays: Mapping[str, np.ndarray], counts_B: np.ndarray
) -> Iterator[Violation]:
    if manifest.rows is None:
        return
    starts_B = np.cumsum(counts_B) - counts_B
    wrong_B = arrays["num_rows"] != counts_B
    for violation in first_violation("I11", wrong_B, "num_rows", arrays["num_rows"], counts_B):
        yield violation._replace(row=int(starts_B[violation.row]))
    position_P = arrays["position"].astype(np.int64)
    rank_P = np.arange(len(position_P)) - np.repeat(starts_B, counts_B)
    settings = manifest.identity["labels"].get("positions", {})
    if settings.get("policy") == "cells":
        yield from first_violation("I12", position_P != rank_P, "position", position_P, rank_P)
        return
    apart = settings["every"] if settings.get("policy") == "every" else 1
    wrong_P = np.zeros(len(position_P), bool)
    wrong_P[1:] = (np.diff(position_P) < apart) & (rank_P[1:] > 0)
    yield from first_violation(
        "I12", wrong_P, "position", position_P, f"{apart} above the one before, or more"
    )
