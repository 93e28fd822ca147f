"""Look through a cache in a browser: samples with image or text, and what the teacher gives them.

softcache browse runs/digits/cache
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click

from softcache.reader.open import open_cache
from softcache.runtime.logging import log_info
from softcache.runtime.signals import Interrupted

from .options import CACHE, LOCAL, OWN_CONFIG, config_file_options

__all__ = ["browse"]


@click.command()
@click.argument("url", metavar="CACHE", type=CACHE)
@config_file_options(
    help=f"The config that made the cache, for images and texts [default: {OWN_CONFIG}, where it names this cache]."
)
@click.option(
    "--out", metavar="FILE", type=LOCAL, help="Write one HTML file with some samples; start no server."
)
@click.option(
    "--samples",
    "num_shown",
    type=click.IntRange(1, 5000),
    help="Samples in the file of --out [default: 200, of texts 40].",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default="a free one",
    help="Port of 127.0.0.1.",
)
@click.option("--open", "opens", is_flag=True, help="Open the page in the default browser.")
def browse(
    url: str,
    config_path: str | None,
    overrides: tuple[str, ...],
    out: str | None,
    num_shown: int | None,
    port: int,
    opens: bool,
) -> None:
    """Look through CACHE in a browser: images or texts, the teacher's classes, entropy, agreement.

    The page is on 127.0.0.1 alone until Ctrl-C; with --out it is one file. Nothing is loaded from other machines.

    \b
    Example:
      softcache browse runs/digits/cache
      softcache browse runs/digits/cache --config configs/digits.toml --out cache.html
    """
    from softcache.tools.browse import Browser, SourceSamples, make_server

    if num_shown is not None and out is None:
        raise click.UsageError(
            "--samples: is of the file that --out writes; the page of the server has all samples"
        )
    cache = open_cache(url)
    browser = Browser(cache, SourceSamples(cache, _data(config_path, overrides, url)))
    if out is not None:
        from softcache.tools.page import write_whole

        size = write_whole(out, browser.page(num_shown=num_shown)[0], "page")
        click.echo(f"wrote {out}: {size / 1e6:.1f} MB")
        return
    server, address = make_server(browser, port)
    click.echo(address)
    log_info("the page is for this machine alone; Ctrl-C ends it")
    if opens:
        click.launch(address)
    with server:
        try:
            server.serve_forever()
        except Interrupted as stopped:
            if stopped.signum != signal.SIGINT:
                raise


def _data(config_path: str | None, overrides: tuple[str, ...], url: str) -> Any:
    """Returns the data of --config, or of the config in this folder where its cache is this one; None without."""
    named = config_path is not None or bool(overrides)
    if not named and not Path(OWN_CONFIG).exists():
        return None
    from softcache.config.load import load_config

    config = load_config(config_path or OWN_CONFIG, overrides)
    if not named and config.cache_places != url.rstrip("/"):
        return None
    from softcache.modalities import open_data

    return open_data(config)
