"""The arithmetic of a trillion tokens and of a billion views: bytes, objects, requests, hours, money.

    python -m benchmarks.arithmetic                        # prints the tables of docs/scale.md
    python -m benchmarks.arithmetic --write docs/scale.md  # puts them there

Every input is a constant below, marked as measured here or assumed; nothing else goes in. Edit the
constants to see your own case.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import click

from softcache.cache.finished import MIN_FOLDED_UNITS
from softcache.cache.folded import BLOCK_UNITS
from softcache.cache.folding import FOLD_EVERY

# -- measured here (docs/benchmarks.md, docs/fidelity.md) --------------------------------------------------

OVERHEAD_SECONDS = 0.008
"""Of a unit on a Dask cluster over a plain run, rounded up: python -m benchmarks.scheduling."""
DECODED_ROWS = {"tokens": 2.0e6, "views": 3.7e6}
"""Rows decoded per second of one core, packed: python -m benchmarks.codecs."""
OPENED_BYTES_PER_SAMPLE = 8.8
OPENED_SECONDS_PER_SAMPLE = 4.2e-9
"""Of opening a cache of 10M images: python -m benchmarks.scale."""

# -- assumed ----------------------------------------------------------------------------------------------

GPU_FLOPS = 989e12
"""Of an H100 SXM, bfloat16 without sparsity, from its data sheet."""
UTILISATION = 0.4
"""Of these, what a forward pass gets."""
DOLLARS_PER_GPU_HOUR = 2.5
DOLLARS_PER_GB_MONTH = 0.023
DOLLARS_PER_PUT = 0.005 / 1000
DOLLARS_PER_GET = 0.0004 / 1000
"""List prices of S3 Standard, us-east-1."""
LISTED = 1000
"""Names in one answer to LIST."""


@dataclass(frozen=True)
class Case:
    """One cache.

    Attributes:
        rows: labels: tokens, or views of images.
        row_bytes: stored, measured here on labels of this shape; of images with 8 for the fingerprint.
        shards: objects of a unit without its marker, by store and codec.
        row_flops: of the teacher's forward pass, assumed: 2 per parameter and token, or the model's own figure.
        row_memory: bytes of a label in memory before it is encoded.
    """

    name: str
    kind: str
    rows: float
    row_bytes: float
    shards: int
    row_flops: float
    unit_rows: int
    row_memory: float

    @property
    def bytes(self) -> float:
        return self.rows * self.row_bytes

    @property
    def rows_per_second(self) -> float:
        """Of one GPU.

        >>> round(TEXT.rows_per_second)
        24725
        """
        return GPU_FLOPS * UTILISATION / self.row_flops

    @property
    def units(self) -> int:
        """
        >>> TEXT.units
        953675
        """
        return math.ceil(self.rows / self.unit_rows)

    @property
    def objects(self) -> int:
        """Shards and markers.

        >>> IMAGES.objects == IMAGES.units * 3
        True
        """
        return self.units * (self.shards + 1)

    @property
    def writes(self) -> int:
        """Put requests: shards, the marker, a claim and its end."""
        return self.units * (self.shards + 3)

    @property
    def rerun_reads(self) -> int:
        """Requests of a rerun before its first unit, at worst: two listings, the end of each block of markers, and the
        markers that a run that was killed left loose, read to be folded, compared, and those that stay.
        """
        blocks = math.ceil(self.units / BLOCK_UNITS) if self.units >= MIN_FOLDED_UNITS else 0
        loose = min(self.units, 3 * FOLD_EVERY)
        listed = blocks * (BLOCK_UNITS // FOLD_EVERY + 1) + loose
        return loose + 3 * blocks + 2 * math.ceil(listed / LISTED)

    @property
    def gpu_hours(self) -> float:
        return self.rows / self.rows_per_second / 3600

    @property
    def unit_seconds(self) -> float:
        """What one GPU takes for a unit, and so what a death costs at most."""
        return self.unit_rows / self.rows_per_second

    @property
    def overhead(self) -> float:
        """Share of the time that a unit's scheduling takes."""
        return OVERHEAD_SECONDS / self.unit_seconds

    @property
    def unit_memory(self) -> float:
        """Bytes of labels on a worker: one that is labeled, two that wait, one that is published."""
        return 4 * self.unit_rows * self.row_memory


def record_bytes(k: int) -> float:
    """Bytes of a row before encoding: int64 ids and float32 log-probabilities, eight tails, truth, four statistics.

    >>> record_bytes(64)
    820.0
    """
    return 12.0 * k + 4 * (8 + 1 + 4)


TEXT = Case("1T tokens, 8B teacher", "tokens", 1e12, 152.7, 4, 2 * 8e9, 2**20, record_bytes(64))
TEXT_LARGE = Case("1T tokens, 32B teacher", "tokens", 1e12, 152.7, 4, 2 * 32e9, 2**20, record_bytes(64))
IMAGES = Case("1B views, ViT-L/14 teacher", "views", 1e9, 35.1 + 8, 2, 162e9, 2**18, record_bytes(10))
CASES = (TEXT, TEXT_LARGE, IMAGES)


def quantity(value: float, unit: str = "") -> str:
    """
    >>> quantity(1.527e14, "B"), quantity(953_675), quantity(0.023)
    ('153 TB', '954 thousand', '0.023')
    """
    steps = ("", "k", "M", "G", "T", "P") if unit else ("", " thousand", " million", " billion", " trillion")
    step = min(len(steps) - 1, int(math.log10(abs(value)) // 3)) if abs(value) >= 1000 else 0
    number = value / 1000**step
    digits = f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
    return f"{digits} {steps[step]}{unit}" if unit else f"{digits}{steps[step]}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def totals() -> str:
    """Returns the first table: one column per case."""
    lines = {
        "stored bytes of a row (measured)": lambda c: f"{c.row_bytes:g}",
        "bytes": lambda c: quantity(c.bytes, "B"),
        "storage, a month": lambda c: f"${quantity(c.bytes / 1e9 * DOLLARS_PER_GB_MONTH)}",
        "rows of a unit": lambda c: f"{c.unit_rows:,}",
        "units": lambda c: quantity(c.units),
        "objects": lambda c: quantity(c.objects),
        "bytes of a unit": lambda c: quantity(c.unit_rows * c.row_bytes, "B"),
        "write requests": lambda c: f"{quantity(c.writes)}, ${quantity(c.writes * DOLLARS_PER_PUT)}",
        "reads of a rerun, at most": lambda c: (
            f"{quantity(c.rerun_reads)}, ${quantity(c.rerun_reads * DOLLARS_PER_GET)}"
        ),
        "rows/s of one GPU (assumed)": lambda c: f"{c.rows_per_second:,.0f}",
        "GPU-hours": lambda c: quantity(c.gpu_hours),
        "of money": lambda c: f"${quantity(c.gpu_hours * DOLLARS_PER_GPU_HOUR)}",
        "GPUs to finish in a week": lambda c: f"{math.ceil(c.gpu_hours / 24 / 7):,}",
        "seconds of a unit (lost by a death, at most)": lambda c: f"{c.unit_seconds:,.0f}",
        "overhead of scheduling": lambda c: f"{c.overhead:.3%}",
        "written by one GPU": lambda c: quantity(c.rows_per_second * c.row_bytes, "B") + "/s",
        "labels in a worker's memory": lambda c: quantity(c.unit_memory, "B"),
        "core-hours to decode an epoch": lambda c: quantity(c.rows / DECODED_ROWS[c.kind] / 3600),
    }
    return table(
        ["", *(case.name for case in CASES)], [[name, *map(tell, CASES)] for name, tell in lines.items()]
    )


def unit_sizes() -> str:
    """Returns the second table: what the size of a unit does to a trillion tokens."""
    rows = []
    for power in (14, 17, 20, 22, 24):
        case = Case(
            "", "tokens", TEXT.rows, TEXT.row_bytes, TEXT.shards, TEXT.row_flops, 2**power, TEXT.row_memory
        )
        rows.append(
            [
                f"{case.unit_rows:,}",
                quantity(case.units) + (" (more than a plan may have)" if case.units > 10_000_000 else ""),
                quantity(case.objects),
                f"${quantity(case.writes * DOLLARS_PER_PUT)}",
                f"{case.unit_seconds:,.1f} s",
                f"{case.overhead:.3%}",
                quantity(case.unit_memory, "B"),
            ]
        )
    columns = ["rows of a unit", "units", "objects", "writes", "a unit takes", "overhead", "worker's memory"]
    return table(columns, rows)


def tables() -> dict[str, str]:
    return {"totals": totals(), "unit sizes": unit_sizes()}


@click.command()
@click.option("--write", metavar="FILE", help="Put the tables between their marks in this page.")
def main(write: str | None) -> None:
    """Compute the tables of docs/scale.md."""
    if write is None:
        click.echo("\n\n".join(tables().values()))
        return
    page = Path(write)
    text = page.read_text()
    for name, content in tables().items():
        marked = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(marked, lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text, flags=re.S)  # type: ignore[misc]
    page.write_text(text)


if __name__ == "__main__":
    main()
