"""The page: one HTML file with everything in it, plotly's own script included.

plotly.js is 4.8 MB; it goes in compressed (gzip in base64, 1.9 MB) and the browser unpacks it (DecompressionStream, in all
browsers since 2023). Its policy (Content-Security-Policy) forbids every request: what it shows stays
where it is.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from softcache.runs.report.cache_section import cache_section
from softcache.runs.report.examples import Names
from softcache.runs.report.load import Report
from softcache.runs.report.plots import Section, Styles, load_plotly
from softcache.runs.report.predictions import observe
from softcache.runs.report.student_sections import (
    calibration_section,
    cost_section,
    curves_section,
    glance_section,
)
from softcache.runs.report.transfer_sections import compression_section, knowledge_section
from softcache.tools.page import escape_json, read_asset, write_whole

__all__ = ["build_sections", "write_page"]


def build_sections(
    report: Report, *, fidelity: Path | None = None, progress: Callable[[str], None] = lambda what: None
) -> list[Section]:
    """Returns the sections of a report; every student runs once over the held-out split.

    Args:
        fidelity: what `softcache fidelity` wrote; None: look where it writes by default.
        progress: called with what is done next.

    Raises:
        MissingExtraError: plotly or Jinja2 is not installed.
        RunError: the fidelity report is of another cache.
    """
    load_plotly()
    styles, names = Styles(report.runs), Names(report)
    progress("students on the held-out split")
    held_out = observe(report, split="held-out")
    transfer, why = (held_out, None) if held_out.teacher is not None else (None, report.missing["teacher"])
    if transfer is None and report.cache is not None:
        if report.cache.manifest.codec.get("sampling") or report.cache.skips_positions:
            why = f"{why}, and the cache holds classes drawn at random, or some positions only"
        elif not report.cache.is_complete:
            why = f"{why}, and the cache is not finished"
        else:
            progress("students on the training split")
            transfer = observe(report, split="training")
    progress("figures")
    return [
        glance_section(report, styles, held_out),
        curves_section(report, styles),
        calibration_section(report, styles, held_out),
        knowledge_section(report, styles, transfer, names, why),
        compression_section(report, styles, transfer, names, why),
        cache_section(report, fidelity),
        cost_section(report),
    ]


def write_page(
    out: str | Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    students: Sequence[Any],
    sections: Sequence[Section],
) -> int:
    """Writes the page, whole or not at all; returns its bytes.

    Args:
        facts: lines of the page's head: what, and its value.
        students: (name, colour, kind of line), for the filter.

    Raises:
        StorageError: it cannot be written.
        MissingExtraError: plotly or Jinja2 is not installed.
    """
    load_plotly()
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("softcache.runs.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = {figure.key: figure.plot for section in sections for figure in section.figures if figure.plot}
    html = environment.get_template("page.html.jinja").render(
        title=title,
        facts=facts,
        students=students,
        sections=sections,
        style=read_asset("style.css") + environment.loader.get_source(environment, "page.css")[0],  # type: ignore[union-attr]
        theme=read_asset("theme.js"),
        plots=escape_json(to_json_plotly(plots)),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
    )
    return write_whole(out, html, "report")
