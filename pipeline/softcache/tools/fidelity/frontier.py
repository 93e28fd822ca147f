"""Bytes against error: records of every policy and codec, made of the same logits, stored as the store would store them.

Nothing is written: the label columns of the rows go through the Zarr store's own encoder, in one chunk, and come back
through the codec. A chunk of fewer rows compresses less well: against chunks of 2,048, 512 rows overstate codec open by 1%
and packed by 10% (V = 4,096, K = 64), 2,048 by nothing. The other columns of a cache (fingerprints, positions) cost the same
whatever the policy; the caller passes their bytes.

With the 512 rows of V = 4,096 and two temperatures all 96 points take 15 seconds of one core.

Drawn records are made `DRAWS` times, from different seeds. What their errors have in common is bias, what they have not is
noise; with so few draws a bias below a third of the noise cannot be distinguished from none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from softcache.cache.codecs import DEFAULT_STEP, Codec, OpenCodec, PackedCodec, VectorCodec
from softcache.cache.codecs.vectors import Vector
from softcache.cache.manifest import Manifest, Plan
from softcache.cache.storage.local import LocalObjects
from softcache.cache.units import open_store
from softcache.labels import DEFAULT_TEMPERATURES, OutputHead, SoftLabels, VectorLabels, truncate_labels
from softcache.labels.sparsify import Hidden, LabelSettings, TopK, label_settings
from softcache.losses import kl_terms
from softcache.teacher.capture.shared import leading_coordinates
from softcache.tools.fidelity.metrics import gradient_difference, measure
from softcache.tools.fidelity.reference import ReferenceDistribution
from softcache.tools.fidelity.teacher_logits import Rerun

__all__ = ["DEFAULT_CODECS", "Point", "codecs", "encoded_bytes", "frontier", "num_points", "plan_points"]

MAX_K = 512
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
STEPS = (1 / 8, 1 / 32, DEFAULT_STEP)
DEFAULT_CODECS = ("open float16", f"packed 1/{round(1 / DEFAULT_STEP)}")
"""The codecs under which every policy is measured: the defaults of the two."""
DRAWS = 4
STATE_VALUES = ("bfloat16", "int8", "float8_e4m3")
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Point:
    """One policy and codec, and what it costs and holds.

    Attributes:
        policy: as in `[labels]`.
        codec: "open float16", "open float32" or "packed 1/32"; of hidden states how their numbers are stored.
        k, p, draws, proposal_exponent, components: of the policy; None where it does not read them.
        bytes_per_position: of a column and in total, with the columns other than labels.
        temperatures: the means by temperature: `kl_nats` and `bucket_kl_nats` (None of drawn records), `gradient_error`
            and of drawn records its two parts `gradient_bias` and `gradient_noise`; all relative to the true gradient.
    """

    policy: str
    codec: str
    k: int | None = None
    p: float | None = None
    draws: int | None = None
    proposal_exponent: float | None = None
    components: int | None = None
    bytes_per_position: dict[str, float] = field(default_factory=dict)
    temperatures: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def codecs(num_classes: int, temperatures: tuple[float, ...]) -> dict[str, Callable[..., Codec]]:
    """Returns makers of the codecs that are compared, by name; each takes `k` and `sampling`."""
    common: dict[str, Any] = {"num_classes": num_classes, "temperatures": temperatures}
    makers: dict[str, Callable[..., Codec]] = {}
    for values in ("float16", "float32"):
        makers[f"open {values}"] = _maker(OpenCodec, **common, values=values)
    for step in STEPS:
        makers[f"packed 1/{round(1 / step)}"] = _maker(PackedCodec, **common, step=step)
    return makers


def _maker(kind: Any, **fixed: Any) -> Callable[..., Codec]:
    return lambda **more: kind(**fixed, **more)


def plan_points(num_classes: int, names: Sequence[str], exponent: float = 1.0) -> list[Point]:
    """Returns the points to measure: K by powers of two for every codec, masses and draws for two of them."""
    how: dict[str, Any] = {"proposal_exponent": exponent}
    sizes = [2**power for power in range(10) if 2**power <= min(MAX_K, num_classes)]
    if num_classes <= MAX_K and num_classes not in sizes:
        sizes.append(num_classes)
    points = [Point("top_k", name, k=k) for name in names for k in sizes]
    few = [name for name in names if name in DEFAULT_CODECS]
    points += [Point("top_p", name, k=sizes[-1], p=p) for name in few for p in MASSES]
    for slots in [size for size in sizes if 4 <= size < num_classes]:
        points += [Point("sample", name, draws=slots, **how) for name in few]
        points += [Point("hybrid", name, k=slots // 2, draws=slots - slots // 2, **how) for name in few]
    return points


def plan_state_points(num_classes: int, width: int | None) -> list[Point]:
    """Returns the points of hidden states of that width: every encoding, and halves of the coordinates down to a 16th.

    A head of V classes reads V - 1 directions of a state.
    """
    if width is None:
        return []
    halves = [width // 2**power for power in range(1, 5)]
    sizes = [size for size in halves if 4 <= size < num_classes]
    return [
        *(Point("hidden", values) for values in STATE_VALUES),
        *(Point("hidden", "int8", components=size) for size in sizes),
    ]


def num_points(num_classes: int, width: int | None = None) -> int:
    """Returns how many points `frontier` measures; `width` is that of the teacher's hidden states, if it has any."""
    return len(plan_points(num_classes, list(codecs(num_classes, (1.0,))))) + len(
        plan_state_points(num_classes, width)
    )


def frontier(
    rerun: Rerun,
    manifest: Manifest,
    *,
    temperatures: Sequence[float],
    other_bytes: float,
    progress: Callable[[int], None] = lambda points: None,
) -> list[Point]:
    """Measures every point on the rows of a rerun.

    Args:
        manifest: of the cache; its grid and its chunks are used.
        temperatures: at which to measure. Draws are made for the first of them: from p^(1/T), T being the grid's nearest.
        other_bytes: of a position's columns other than labels.
        progress: called with a number of points.
    """
    grid = tuple(manifest.codec["temperatures"]) or DEFAULT_TEMPERATURES
    num_classes = rerun.logits_PV.shape[1]
    makers = codecs(num_classes, grid)
    truths = [ReferenceDistribution(rerun.logits_PV, t) for t in temperatures]
    largest = _sparse(rerun, TopK(k=min(MAX_K, num_classes), temperatures=grid), 0)
    drawn: dict[LabelSettings, dict[str, dict[str, float | None]]] = {}
    out = []
    drawn_at = min(grid, key=lambda t: abs(t - temperatures[0]))
    for point in plan_points(num_classes, list(makers), 1.0 / drawn_at):
        if point.draws is None:
            assert point.k is not None
            labels = truncate_labels(largest, point.k, p=point.p)
        else:
            numbers = {"num_samples": point.draws, "proposal_temperature": drawn_at, "temperatures": grid}
            settings = label_settings(point.policy, **numbers, **({} if point.k is None else {"k": point.k}))
            labels = _sparse(rerun, settings, 0)
            if settings not in drawn:
                drawn[settings] = _draw_errors(rerun, settings, truths)
        codec = makers[point.codec](k=labels.k, sampling=labels.sampling)
        columns = codec.encode(labels.to_numpy())
        size = encoded_bytes(columns, codec, manifest) | {"other columns": other_bytes}
        found: dict[str, dict[str, float | None]]
        if point.draws is None:
            stored = codec.decode(columns).to_torch()
            found = {f"{truth.temperature:g}": _cut_errors(stored, truth) for truth in truths}
        else:
            found = drawn[settings]
        out.append(
            replace(point, bytes_per_position=size | {"total": sum(size.values())}, temperatures=found)
        )
        progress(1)
    for state_point in _measure_states(rerun, manifest, truths, other_bytes):
        out.append(state_point)
        progress(1)
    return out


def _measure_states(
    rerun: Rerun, manifest: Manifest, truths: Sequence[ReferenceDistribution], other_bytes: float
) -> Iterator[Point]:
    """Yields the points of hidden states, measured; none where the teacher has none."""
    if rerun.states is None:
        return
    whole, points = rerun.states.head, plan_state_points(rerun.logits_PV.shape[1], rerun.width)
    most = max((point.components or 0 for point in points), default=0)
    leading = leading_coordinates(rerun.states.sampled_ND, whole, most) if most else whole
    for point in points:
        size, head = point.components, whole
        if size is not None:  # fewer coordinates are the first of more
            head = leading._replace(weight=leading.weight[:, :size], encoder=leading.encoder[:, :size])
        settings = Hidden.model_validate({"values": point.codec, "components": size})
        labels = settings.apply_states(rerun.states.states_PD, head)
        vector = Vector(size or rerun.states.states_PD.shape[1], point.codec)
        codec = VectorCodec(rerun.logits_PV.shape[1], (("hidden", vector),))
        sizes = encoded_bytes(dict(labels.to_numpy().arrays), codec, manifest) | {
            "other columns": other_bytes
        }
        yield replace(
            point,
            bytes_per_position=sizes | {"total": sum(sizes.values())},
            temperatures=_state_errors(labels, head, rerun, truths),
        )


def _state_errors(
    labels: VectorLabels, head: OutputHead, rerun: Rerun, truths: Sequence[ReferenceDistribution]
) -> dict[str, dict[str, float | None]]:
    """Returns the errors of what a head makes of stored states, by temperature; each class is a bucket."""
    rows = max(1, _CHUNK_ELEMENTS // rerun.logits_PV.shape[1])
    nats, squares = [0.0] * len(truths), [0.0] * len(truths)
    labels = replace(labels, head=_Known(head))
    for start in range(0, len(rerun), rows):
        part = slice(start, start + rows)
        found_PV, truth_PV = labels.take(part).head_logits().double(), rerun.logits_PV[part].double()
        for index, truth in enumerate(truths):
            log_p_PV, log_q_PV = ((z / truth.temperature).log_softmax(1) for z in (truth_PV, found_PV))
            nats[index] += float(kl_terms(log_p_PV, log_q_PV).sum())
            squares[index] += float((log_p_PV.exp() - log_q_PV.exp()).square().sum())
    return {
        f"{truth.temperature:g}": {
            "kl_nats": total / len(rerun),
            "bucket_kl_nats": total / len(rerun),
            "gradient_error": (square / float(truth.gradient_P.sum())) ** 0.5,
            "gradient_bias": (square / float(truth.gradient_P.sum())) ** 0.5,
            "gradient_noise": 0.0,
        }
        for truth, total, square in zip(truths, nats, squares, strict=True)
    }


class _Known(NamedTuple):
    """A head that is there already."""

    head: OutputHead

    def load(self, device: Any) -> OutputHead:
        return self.head


def _sparse(rerun: Rerun, settings: LabelSettings, draw: int, rows: slice = slice(None)) -> SoftLabels:
    seeds_P = rerun.seeds_P[rows] + draw
    return settings.apply(rerun.logits_PV[rows], targets_P=rerun.targets_P[rows], seeds_P=seeds_P)


def encoded_bytes(columns: dict[str, Any], codec: Codec, manifest: Manifest) -> dict[str, float]:
    """Returns the bytes per row of label columns [P, ...] as a Zarr store writes them, by column."""
    rows = len(next(iter(columns.values())))
    plan = Plan(num_samples=rows, num_views=1, unit_samples=rows, chunk_samples=rows)
    described = manifest.model_copy(
        update={"rows": None, "plan": plan, "codec": codec.to_dict(), "store": "zarr", "data": "labels.zarr"}
    )
    store = open_store(described, _Nowhere())
    columns = columns | {"fingerprint": torch.zeros(rows, dtype=torch.uint64).numpy()}
    encoded = store.encode(plan.unit(0), columns)
    return {str(name): len(data) / rows for name, data in encoded.values() if name != "fingerprint"}


class _Nowhere(LocalObjects):
    """A store's objects where nothing is read or written."""

    def __init__(self) -> None:
        self.url = "nowhere"


def _cut_errors(labels: SoftLabels, truth: ReferenceDistribution) -> dict[str, float | None]:
    found = measure(labels, truth)
    error = float(found["gradient"].sum() / truth.gradient_P.sum()) ** 0.5
    return {
        "kl_nats": float(found["kl_nats"].mean()),
        "bucket_kl_nats": float(found["bucket_kl_nats"].mean()),
        "gradient_error": error,
        "gradient_bias": error,
        "gradient_noise": 0.0,
    }


def _draw_errors(
    rerun: Rerun, settings: LabelSettings, truths: Sequence[ReferenceDistribution]
) -> dict[str, dict[str, float | None]]:
    """Bias and noise of a policy that draws, by temperature.

    With e_r the difference of draw r, m their mean: noise^2 = sum |e_r - m|^2 / (R - 1), bias^2 = |m|^2 - noise^2 / R.
    """
    rows = max(1, _CHUNK_ELEMENTS // rerun.logits_PV.shape[1])
    means, squares = [0.0] * len(truths), [0.0] * len(truths)
    for start in range(0, len(rerun), rows):
        part = slice(start, start + rows)
        records = [_sparse(rerun, settings, draw, part) for draw in range(DRAWS)]
        for index, truth in enumerate(truths):
            here = ReferenceDistribution(rerun.logits_PV[part], truth.temperature)
            mean_PV: Any = 0.0
            for record in records:
                difference_PV = gradient_difference(record, here)
                squares[index] += float(difference_PV.square().sum())
                mean_PV = mean_PV + difference_PV
            means[index] += float((mean_PV / DRAWS).square().sum())
    found = {}
    for mean, square, truth in zip(means, squares, truths, strict=True):
        noise = max(0.0, square - DRAWS * mean) / (DRAWS - 1)
        whole = float(truth.gradient_P.sum())
        found[f"{truth.temperature:g}"] = {
            "kl_nats": None,
            "bucket_kl_nats": None,
            "gradient_error": (square / DRAWS / whole) ** 0.5,
            "gradient_bias": (max(0.0, mean - noise / DRAWS) / whole) ** 0.5,
            "gradient_noise": (noise / whole) ** 0.5,
        }
    return found
