"""Make a cache from log-probabilities of a vLLM or OpenAI-compatible server.

softcache import responses.jsonl --config runs/my.toml --cache runs/my/cache
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softcache.errors import ConfigError
from softcache.runtime.logging import log_info, progress_bar

from .options import PATH, cache_option, cache_report, config_options, json_option, print_json

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["import_command"]


@click.command("import")
@click.argument("responses", metavar="RESPONSES...", type=PATH, nargs=-1, required=True)
@config_options
@cache_option
@json_option
@click.option("--k", type=click.IntRange(1), help="Tokens kept per row [default: labels.k of the config].")
@click.option("--model-name", metavar="TEXT", help="The teacher's name [default: the responses' `model`].")
@click.option(
    "--allow-missing", is_flag=True, help="Import the units whose samples are complete; others can follow."
)
def import_command(
    responses: tuple[str, ...],
    config: RunConfig,
    url: str | None,
    k: int | None,
    model_name: str | None,
    allow_missing: bool,
    as_json: bool,
) -> None:
    """Make a cache from RESPONSES: JSON lines with a server's log-probabilities over the config's text.

    Every answer is compared, token by token, with the source. The labels serve temperature 1 only; see
    docs/how-to/import-logprobs.md for the request and the accepted shapes. A rerun after a kill completes
    what is missing.

    \b
    Example:
      softcache import responses.jsonl --config my.toml --cache runs/my/cache --k 20
    """
    from softcache.data.tokens import TokenData
    from softcache.modalities import modality_of
    from softcache.tools.import_logprobs import find_responses, import_labels

    url = url or config.cache_url
    if not modality_of(config).imports_responses:
        raise ConfigError(
            f"config {config.name}: source.modality is {config.source.modality}; a server's log-probabilities are of text"
        )
    k = k or getattr(config.labels, "k", None)
    if "k" not in type(config.labels).model_fields or k is None:
        raise ConfigError(
            f"config {config.name}: labels.policy: {config.labels.policy}; an import keeps the labels.k most likely tokens"
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
            progress=advance,
        )
    if as_json:
        made = {"units_made": report.units_done, "units_found": report.units_found, "seconds": report.seconds}
        print_json(cache_report(cache) | made)
        return
    plan, rows = cache.manifest.plan, cache.num_rows_done
    click.echo(
        f"cache {url}: {rows:,} rows of {cache.manifest.identity['teacher']['spec']}, K={cache.manifest.codec['k']} of "
        f"{cache.num_classes} classes, at temperature 1; {report.units_done} units made now, {report.units_found} "
        f"found, {len(cache.missing_units)} of {plan.num_units} missing; {report.seconds:.1f} s"
    )
