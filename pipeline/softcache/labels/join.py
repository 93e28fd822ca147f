"""Several label records made into one."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from array_api_compat import array_namespace

from softcache.errors import LabelError
from softcache.labels.soft_labels import ARRAYS, Array, SoftLabels

__all__ = ["collect", "concat"]


def concat(records: Sequence[SoftLabels]) -> SoftLabels:
    """One record of all positions, in order.

    Args:
        records: at least one; all of one kind, K, number of classes, grid and `max_temperature`, with the same optional
            columns.

    Returns:
        A record of sum(P) positions; the arrays are new.

    Raises:
        LabelError: no records, or records that differ in more than their positions.
    """
    if not records:
        raise LabelError(
            "concat: expected at least one label record; found none; check that the source is not empty"
        )
    first = records[0]
    for index, record in enumerate(records):
        for name in (
            "num_classes",
            "temperatures",
            "max_temperature",
            "tail_rounding",
            "sampling",
            "k",
            "is_torch",
        ):
            expected, found = getattr(first, name), getattr(record, name)
            if expected != found:
                raise LabelError(
                    f"concat, record {index}: expected {name} {expected} as in record 0; found {found}; "
                    "join only records of one cache or one label policy"
                )
    columns: dict[str, Array] = {}
    xp = array_namespace(first.ids)
    for name in ARRAYS:
        arrays = [getattr(record, name) for record in records]
        present = [x is not None for x in arrays]
        if any(present) and not all(present):
            raise LabelError(
                f"concat: expected {name} in every record or in none; record {present.index(False)} has none"
                f"; drop it with dataclasses.replace(record, {name}=None) or compute it for all"
            )
        columns[name] = xp.concat(arrays, axis=0) if all(present) else None
    return replace(first, **columns)


def collect(records: Iterable[SoftLabels], num_positions: int) -> SoftLabels:
    """One record of all positions, in order, each copied into its place as it comes.

    Like `concat`, but no part is kept: small parts that stay behind between large temporaries would keep the allocator
    from using their memory again (seen: 9 GB where 70 MB are needed).

    Args:
        records: torch records of one K, number of classes and grid, with the same optional columns.
        num_positions: of all together.

    Raises:
        LabelError: no records, or not so many positions.
    """
    whole: SoftLabels | None = None
    start = 0
    for record in records:
        if len(record) == num_positions:
            return record
        if whole is None:
            whole = record.map_arrays(lambda x: x.new_empty((num_positions, *x.shape[1:])))
        stop = start + len(record)
        for name in ARRAYS:
            if (array := getattr(record, name)) is not None and stop <= num_positions:
                getattr(whole, name)[start:stop] = array
        start = stop
    if whole is None or start != num_positions:
        raise LabelError(
            f"collect: expected records of {num_positions} positions; found {start}; check the chunks"
        )
    return whole
