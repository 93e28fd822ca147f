"""Make a cache from log-probabilities of a vLLM or OpenAI-compatible server, or from another program's cache.

softcache import responses.jsonl --config runs/my.toml --cache runs/my/cache
softcache import logits_top100_epoch0 --format tinyvit --config imagenet.toml --cache runs/tinyvit/cache --model-name clip-l
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softcache.errors import ConfigError
from softcache.runtime.display import format_duration
from softcache.runtime.logging import log_info, progress_bar

from .options import LOCAL, cache_option, cache_report, config_options, json_option, print_json

if TYPE_CHECKING:
    from softcache.config.run import RunConfig
    from softcache.reader.cache import Cache
    from softcache.teacher.capture.run import CaptureReport

__all__ = ["import_command"]

RESPONSES = "responses"


@click.command("import")
@click.argument("paths", metavar="PATH...", type=LOCAL, nargs=-1, required=True)
@config_options
@cache_option
@json_option
@click.option(
    "--format",
    "format_name",
    metavar="NAME",
    default=RESPONSES,
    help="What PATH is: a server's responses, or a cache of distillkit, fkd, ml-dr or tinyvit.",
)
@click.option(
    "--k",
    type=click.IntRange(1),
    help="Classes kept per row [default: labels.k of the config; of another program's cache all].",
)
@click.option("--model-name", metavar="NAME", help="The teacher's name [default: the responses' `model`].")
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Of responses: import the units whose samples are complete; others can follow.",
)
@click.option(
    "--truncated",
    is_flag=True,
    help="Of responses: the teacher is cut to its top-k or top-p; tokens that are not given have nothing.",
)
@click.option(
    "--plain-view",
    is_flag=True,
    help="Of one view of images: it was the plain view of [views], so students see that.",
)
def import_command(
    paths: tuple[str, ...],
    config: RunConfig,
    url: str | None,
    format_name: str,
    k: int | None,
    model_name: str | None,
    allow_missing: bool,
    truncated: bool,
    plain_view: bool,
    as_json: bool,
) -> None:
    """Make a cache from a server's log-probabilities, or from another program's cache.

    Every answer of a server is compared, token by token, with the source (docs/how-to/import-logprobs.md); what other
    programs keep, and what they lack, is in docs/how-to/import-caches.md. The labels serve temperature 1 only. A rerun
    after a kill completes what is missing.

    \b
    Example:
      softcache import responses.jsonl --config my.toml --cache runs/my/cache --k 20
      softcache import saved_logits --format tinyvit --config my.toml --cache runs/my/cache --model-name clip-l
    """
    if format_name == RESPONSES:
        if plain_view:
            raise click.UsageError("--plain-view is of images; a server's responses are of text")
        _import_responses(paths, config, url, k, model_name, allow_missing, truncated, as_json)
        return
    if allow_missing:
        raise click.UsageError(
            "--allow-missing is of a server's responses; give all files of another program's cache"
        )
    if truncated:
        raise click.UsageError("--truncated is of a server's responses; drop it")
    _import_cache(paths, config, url, format_name, k, model_name, plain_view, as_json)


def _import_responses(
    responses: tuple[str, ...],
    config: RunConfig,
    url: str | None,
    k: int | None,
    model_name: str | None,
    allow_missing: bool,
    is_truncated: bool,
    as_json: bool,
) -> None:
    from softcache.data.tokens import TokenData
    from softcache.modalities import modality_of
    from softcache.tools.import_logprobs import find_responses, import_labels

    url = url or config.cache_url
    if not modality_of(config).imports_responses:
        raise ConfigError(
            f"config {config.name}: source.modality is {config.source.modality}; a server's log-probabilities are of text"
        )
    k = k or getattr(config.labels, "k", None)
    if config.labels.policy != "top_k" or k is None:
        raise ConfigError(
            f"config {config.name}: labels.policy: {config.labels.policy}; an import keeps the labels.k most likely tokens, "
            'and neither draws others nor leaves some out; set it to "top_k"'
        )
    if config.labels.positions.policy != "all":
        raise ConfigError(
            f"config {config.name}: labels.positions: {config.labels.positions.policy!r}; an import takes every position "
            "that a server answered for; drop the table"
        )
    settings: Any = config.source
    source = settings.open("train")
    data = TokenData(source, cross_documents=settings.cross_documents)
    num_bytes = sum(Path(path).stat().st_size for path in responses if Path(path).is_file())
    with progress_bar("import: find the samples", num_bytes, "bytes") as advance:
        found = find_responses(responses, source, any_model=model_name is not None, progress=advance)
    if found.num_failed:
        log_info(f"import: {found.num_failed} failed requests, the first: {found.first_failed}")
    with progress_bar("import: write labels", int(source.num_rows().sum()), "rows") as advance:
        cache, report = import_labels(
            found,
            data,
            url,
            k=k,
            settings=config.capture,
            model_name=model_name,
            allow_missing=allow_missing,
            is_truncated=is_truncated,
            progress=advance,
        )
    _report(cache, report, url, as_json)


def _import_cache(
    paths: tuple[str, ...],
    config: RunConfig,
    url: str | None,
    format_name: str,
    k: int | None,
    model_name: str | None,
    plain_view: bool,
    as_json: bool,
) -> None:
    from softcache.runs import open_data
    from softcache.tools.import_caches import import_cache, open_original

    if model_name is None:
        raise click.UsageError(
            f"--model-name: missing; files of format {format_name} do not name their teacher"
        )
    url, data = url or config.cache_url, open_data(config).train
    original = open_original(format_name, paths, data)
    num_rows = original.num_views * (
        int(data.source.num_rows().sum()) if data.kind == "tokens" else len(data)
    )
    with progress_bar("import: write labels", num_rows, "rows") as advance:
        cache, report = import_cache(
            original,
            data,
            url,
            settings=config.capture,
            model_name=model_name,
            k=k,
            plain_view=plain_view,
            progress=advance,
        )
    imported = cache.manifest.attributes["imported"]
    more = {"agreement": report.agreement, "rows_scaled": report.rows_scaled, "imported": imported}
    _report(cache, report, url, as_json, **more)
    if as_json:
        return
    click.echo(
        f"the teacher saw {imported['teacher_saw']}; the original lacks {', '.join(imported['missing'])}"
    )
    if report.agreement is not None:
        click.echo(f"most likely class is the ground truth in {report.agreement:.2%} of the rows made now")
    if report.rows_scaled:
        click.echo(f"{report.rows_scaled:,} rows with a sum above 1 were scaled to 1")


def _report(cache: Cache, report: CaptureReport, url: str, as_json: bool, **more: Any) -> None:
    if as_json:
        made = {"units_made": report.units_done, "units_found": report.units_found, "seconds": report.seconds}
        print_json(cache_report(cache) | made | more)
        return
    plan, rows = cache.manifest.plan, cache.num_rows_done
    click.echo(
        f"cache {url}: {rows:,} rows of {cache.manifest.identity['teacher']['spec']}, K={cache.manifest.codec['k']} of "
        f"{cache.num_classes} classes, at temperature 1; {report.units_done} units made now, {report.units_found} "
        f"found, {len(cache.missing_units)} of {plan.num_units} missing; {format_duration(report.seconds)}"
    )
