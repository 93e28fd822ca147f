"""Labels of small models of transformers' architectures against a plain forward: the table of docs/architectures.md.

    python -m benchmarks.architectures [--out docs/architectures.md] [NAME…]

Each model is made here with weights of a fixed seed. Its labels are captured from packed rows of several documents, and
compared with `log_softmax` of a plain forward of each document alone. Without NAME all of them; with names, their rows are
printed and no file is written. Takes about a minute on one core.
"""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version
from pathlib import Path

import click
import torch

from softcache.errors import SpecError
from softcache.runtime.logging import log_info, progress_bar
from tests.support.architectures import ARCHITECTURES, Architecture, Comparison, compare

START, END = "<!-- made by python -m benchmarks.architectures -->", "<!-- end -->"
HEADER = (
    "| model type | features | packed documents run as | float32 | bfloat16, one document | bfloat16, packed "
    "| to rounded logits | bfloat16 itself |\n|---|---|---|--:|--:|--:|--:|--:|"
)
REFUSED = "| model type | features | message |\n|---|---|---|"


def measured(architecture: Architecture, dtype: torch.dtype) -> Comparison | str:
    """Returns the comparison, or the message of a refusal."""
    try:
        return compare(architecture, dtype, with_rounded=True)
    except SpecError as error:
        return str(error)


def row(architecture: Architecture) -> tuple[str, bool]:
    """Returns a row of the first table, or of the second one for a model that is refused in float32."""
    exact, half = (measured(architecture, dtype) for dtype in (torch.float32, torch.bfloat16))
    name = f"| `{architecture.model_type}`" + (f" ({architecture.variant})" if architecture.variant else "")
    if isinstance(exact, str):
        return f"{name} | {architecture.features} | {short(exact)} |", True
    cells = [architecture.features, exact.packing, figure(exact.packed)]
    if isinstance(half, str):
        return " | ".join([name, *cells, "refused", "-", "-", "-"]) + " |", False
    if half.packing != exact.packing:
        cells[1] += f" ({half.packing} in bfloat16)"
    cells += [figure(half.alone), *map(figure, (half.packed, half.rounded, half.noise))]
    return " | ".join([name, *cells]) + " |", False


def short(message: str) -> str:
    """Returns a message without what differs by rounding: the part between the model's name and the advice."""
    message = re.sub(r"^model \w+: |: its logits and those of its parts differ by [^)]*\)", "", message)
    message = re.sub(r" by [\d.e-]+, and packing [^)]*\)", "", message)
    return message.split("; labels would be wrong")[0].replace("|", "/")


def figure(value: float) -> str:
    return f"{value:.4f}" if value >= 5e-5 else f"{value:.1e}"


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option("--out", default="docs/architectures.md", show_default=True, metavar="FILE", type=Path)
def main(names: tuple[str, ...], out: Path) -> None:
    """Compare labels with a plain forward, and write the table into a page."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    chosen = [each for each in ARCHITECTURES if not names or each.name in names or each.model_type in names]
    if not chosen:
        raise click.UsageError(f"unknown: {', '.join(names)}; see tests/support/architectures.py")
    rows = []
    with progress_bar("architectures", len(chosen), "models") as advance:
        for architecture in chosen:
            rows.append(row(architecture))
            advance(1)
    tables = [HEADER, *(text for text, refused in rows if not refused)]
    if any(refused for _, refused in rows):
        tables += ["", "Refused:", "", REFUSED, *(text for text, refused in rows if refused)]
    if names:
        click.echo("\n".join(tables))
        return
    machine = f"transformers {version('transformers')}, torch {version('torch')}, CPU, {len(rows)} models."
    before, _, rest = out.read_text().partition(START)
    after = rest.partition(END)[2]
    out.write_text("\n".join([before + START, "", machine, "", *tables, "", END]) + after)
    log_info(f"wrote {out}")


if __name__ == "__main__":
    main()
