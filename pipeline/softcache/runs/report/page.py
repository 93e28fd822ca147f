"""The page: one HTML file with everything in it, plotly's own script included.

plotly.js is 4.8 MB; it goes in compressed (gzip in base64, 1.9 MB) and the browser unpacks it (DecompressionStream, in all
browsers since 2023). Its policy (Content-Security-Policy) forbids every request: what it shows stays
where it is.
"""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softcache.errors import StorageError
from softcache.runs.report.plots import Section, load_plotly

__all__ = ["write_page"]


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
        # Inside <script>, "</script>" in a name would end it.
        plots=to_json_plotly(plots)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029"),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
    )
    out = Path(out)
    staged = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(html, encoding="utf-8")
        staged.replace(out)
    except OSError as error:
        raise StorageError(f"report {out}: cannot be written: {error}; choose another --out") from error
    return out.stat().st_size
