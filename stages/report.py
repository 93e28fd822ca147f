"""Write an HTML report of finished runs.

make report
softcache report runs/digits/students --out report.html
"""

from pathlib import Path

import click

from softcache.runtime.logging import log_info

from .options import CACHE, LOCAL, PATH

__all__ = ["report_command"]


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=PATH)
@click.option(
    "--cache",
    "urls",
    multiple=True,
    metavar="URL",
    type=CACHE,
    help="The cache [default: that of the runs' config]; may be given several times.",
)
@click.option(
    "--fidelity",
    "fidelity",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What `softcache fidelity` wrote [default: runs/NAME/fidelity/fidelity.json, if it is there].",
)
@click.option(
    "--out",
    default="report.html",
    metavar="FILE",
    type=LOCAL,
    help="The page.",
)
def report_command(runs: tuple[str, ...], urls: tuple[str, ...], fidelity: Path | None, out: str) -> None:
    """Write a page about RUN… (finished runs, or folders of them; paths or URLs): scores, curves, calibration, transfer.

    The page is one file and loads nothing from a server. Sections that need the teacher's weights show a note
    where they are missing.

    \b
    Example:
      softcache report runs/digits/students --out report.html
    """
    from softcache.runs.report import build_sections, open_report, write_page
    from softcache.runs.report.plots import Styles, load_plotly
    from softcache.tools.page import check_is_page

    check_is_page(out, "report")
    load_plotly()
    report = open_report(runs, cache_url=urls)
    sections = build_sections(report, fidelity=fidelity, progress=lambda what: log_info(f"report: {what}"))
    teacher = report.config.teacher.model if report.config.teacher else "none named"
    facts = [
        ("Data", report.data.train.source.name),
        ("Held out", f"{len(report.data.evaluation):,} samples"),
        ("Teacher", teacher),
        ("Cache", ", ".join(cache.url for cache in report.caches) or "not there"),
        ("Students", str(len(report.runs))),
    ]
    styles = Styles(report.runs)
    students = [(run.name, styles.color(run.name), styles.dash(run.name)) for run in report.runs]
    size = write_page(
        out,
        title=f"Distillation report: {report.config.name}",
        facts=facts,
        students=students,
        sections=sections,
    )
    count = f"{len(report.runs)} student{'' if len(report.runs) == 1 else 's'}"
    click.echo(f"wrote {out}: {count}, {size / 1e6:.1f} MB")
