"""Ask a server for the log-probabilities of a config's text; `softcache import` makes a cache of them.

softcache query http://localhost:8000/v1 --config my.toml --out responses.jsonl
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from softcache.errors import ConfigError
from softcache.runtime.display import format_duration
from softcache.runtime.logging import progress_bar

from .options import LOCAL, config_options, json_option, print_json

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["query_command"]


@click.command("query")
@click.argument("url", metavar="URL")
@config_options
@json_option
@click.option("--out", type=LOCAL, default="responses.jsonl", help="The JSON lines to write.")
@click.option("--k", type=click.IntRange(1), help="Likeliest tokens of each position [default: labels.k].")
@click.option("--model", metavar="NAME", help="The model's name on the server [default: its only one].")
@click.option("--concurrency", type=click.IntRange(1), default=32, help="Requests under way.")
@click.option("--attempts", type=click.IntRange(1), default=8, help="Attempts at one request.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(1),
    default=600,
    help="Longest time of one attempt.",
)
def query_command(
    url: str,
    config: RunConfig,
    out: str,
    k: int | None,
    model: str | None,
    concurrency: int,
    attempts: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Ask the OpenAI-compatible server at URL for the log-probabilities of the config's text.

    One request per sample, of token ids, answered with `prompt_logprobs` (vLLM). A rerun asks for the samples that
    the file lacks. OPENAI_API_KEY is sent where it is set. `softcache import` makes a cache of the file.

    \b
    Example:
      softcache query --config my.toml http://localhost:8000/v1
    """
    from softcache.modalities import modality_of
    from softcache.tools.import_logprobs import check_attention
    from softcache.tools.query import Server, query_server

    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"URL {url!r}: expected http://… or https://…, of the server's API (it ends in /v1)"
        )
    if not modality_of(config).imports_responses:
        raise ConfigError(
            f"config {config.name}: source.modality is {config.source.modality}; a server's log-probabilities are of text"
        )
    k = k or getattr(config.labels, "k", None)
    if k is None:
        raise ConfigError(f"config {config.name}: labels.policy: {config.labels.policy}; give --k")
    settings: Any = config.source
    source = settings.open("train")
    check_attention(source, cross_documents=settings.cross_documents)
    server = Server(url.rstrip("/"), os.environ.get("OPENAI_API_KEY"), attempts, timeout)
    with progress_bar("query", len(source)) as advance:
        done = query_server(server, source, out, k=k, model=model, concurrency=concurrency, progress=advance)
    if as_json:
        print_json({"out": out, "samples": len(source)} | asdict(done))
        return
    click.echo(
        f"{out}: {done.found + done.answered:,} of {len(source):,} samples; {done.answered:,} asked now, {done.found:,} "
        f"found, {done.retries} requests made again; "
        f"{format_duration(done.seconds)}; next: softcache import {out} --config FILE"
    )
