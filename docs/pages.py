"""mkdocs' hook of `make docs`: the pages outside of docs/, links out of it, and the order of the sections.

README.md is the site's first page. The pages of all commands and all config keys are generated. A link to a file that is
no page (a config, an example, a test) becomes its name, because the site holds pages only.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import click
from mkdocs.structure.files import File, Files

from softcache.config.reference import keys_page
from softcache.stages.cli import softcache
from softcache.stages.commands import COMMANDS

ROOT = Path(__file__).parent.parent
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
TITLES = {
    "tutorial": "Tutorials",
    "how-to": "How to",
    "": "Explained",
    "design": "Design",
    "design/decisions": "Decisions",
}
FIRST = ["index.md"]
LAST = [
    "commands.md",
    "keys.md",
    "reference.md",
    "format.md",
    "compatibility.md",
    "glossary.md",
    "faq.md",
    "changelog.md",
    "contributing.md",
]

_LINK = re.compile(r"(?<!\!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Lists the pages by folder: a folder's README.md first, the others by name."""
    paths = sorted((ROOT / "docs").rglob("*.md"), key=lambda path: (path.name != "README.md", path))
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in paths]
    sections: list[Any] = ["index.md"]
    for folder, title in TITLES.items():
        inside = [page for page in pages if (PurePosixPath(page).parent.as_posix() or ".") == (folder or ".")]
        sections.append({title: [page for page in inside if page not in LAST]})
    config.nav = [*sections, {"Reference": LAST}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside of docs/ and those that are generated; removes this file."""
    for outside, page in OUTSIDE.items():
        files.append(
            File.generated(config, page, content=inside_links(outside, (ROOT / outside).read_text()))
        )
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "keys.md", content=keys_page()))
    files.remove(files.get_file_from_path("pages.py"))  # type: ignore[arg-type]
    return files


def commands() -> str:
    """Returns the page of all commands, each with its --help."""
    parts = ["# All commands\n\nThe output of every command's `--help`.\n"]
    group = click.Context(softcache, info_name="softcache", terminal_width=110, **softcache.context_settings)
    for name in COMMANDS:
        command = softcache.get_command(group, name)
        assert command is not None
        with click.Context(command, info_name=name, parent=group) as context:
            parts.append(f"## softcache {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page of docs/."""
    if page.file.src_uri in {*OUTSIDE.values(), "commands.md", "keys.md"}:
        return markdown
    return inside_links(f"docs/{page.file.src_uri}", markdown)


def inside_links(place: str, markdown: str) -> str:
    """Returns the text of a file of the repository with its links as the site has them.

    >>> inside_links("README.md", "[how](docs/fusion.md#measured), [a config](configs/digits.toml)")
    '[how](fusion.md#measured), `configs/digits.toml`'
    >>> inside_links("docs/how-to/sweep.md", "[the list](../../README.md#install)")
    '[the list](../index.md#install)'
    """
    here = PurePosixPath(place).parent
    on_site = PurePosixPath(OUTSIDE[place] if place in OUTSIDE else place.removeprefix("docs/")).parent

    def rewritten(found: re.Match) -> str:
        text, link, anchor = found[1], found[2], found[3] or ""
        if "://" in link or link.startswith("mailto:"):
            return found[0]
        target = _normal(here / link)
        if target in OUTSIDE:
            page = OUTSIDE[target]
        elif target.startswith("docs/") and (ROOT / target).is_file():
            page = target.removeprefix("docs/")
        else:
            return f"`{target}`" if "`" not in text else text
        return f"[{text}]({_relative(page, on_site)}{anchor})"

    markdown = (
        re.sub(r"!\[([^\]]*)\]\(docs/", r"![\1](", markdown) if here == PurePosixPath(".") else markdown
    )
    return _LINK.sub(rewritten, markdown)


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _relative(page: str, folder: PurePosixPath) -> str:
    return "../" * len([part for part in folder.parts if part != "."]) + page
