"""The documentation's site: it builds without a warning, holds every page, and loads nothing from other sites."""

import os
import re
import subprocess
import sys

import click
import pytest

from softcache.stages.cli import softcache
from softcache.stages.commands import COMMANDS
from tests.support.caches import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_on_it_and_is_reached_from_the_first(site):
    first = (site / "index.html").read_text()
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    pages = [page.with_name("index.html") if page.name == "README.html" else page for page in pages]
    assert len(pages) > 20
    for page in [*map(str, pages), "commands.html", "changelog.html", "contributing.html"]:
        assert (site / page).exists(), page
        assert f'href="{page}"' in first, page


def test_nothing_is_loaded_from_other_sites(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(https?:[^\"' >]+)", page.read_text()
        )
        assert not fetched, page.name


def test_no_link_is_broken(site):
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links are from the root of a server
            continue
        for link in re.findall(r'<a [^>]*href="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_command_and_option_is_on_the_page_of_commands(site):
    text = (site / "commands.html").read_text()
    for name in COMMANDS:
        assert f"softcache {name}" in text
        for option in softcache.get_command(click.Context(softcache), name).params:
            assert option.param_type_name == "argument" or option.opts[0] in text, f"{name} {option.opts[0]}"


def test_the_reference_has_the_public_names(site):
    import softcache

    text = (site / "reference.html").read_text()
    for name in set(softcache.__all__) - {"__version__", "losses", "sparsify"}:
        assert re.search(rf'id="softcache[\w.]*\.{name}"', text), name
    assert "dkd" in text
    assert "<h4" in text
