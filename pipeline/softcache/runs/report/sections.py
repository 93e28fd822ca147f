"""The sections of the page, in the order of a talk: who won, how it got there, how far it can be trusted, what moved, what
was lost, what is in the cache, what it cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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

__all__ = ["build_sections"]


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
        elif report.cache.missing_units:
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
