"""The pages of the documentation, read block by block, with the comments that control how a test runs them.

The comments are invisible to readers. Each holds from where it stands:

    <!-- test: run with train.epochs=1 --rounds=1 -->      to the end of the page, or until the next one: every command is
                                                           run, with these settings and options where it has them and
                                                           does not set them itself; `run` alone adds nothing, and
                                                           `run at length with …` is for `make chaos`
    <!-- test: where CACHE is runs/digits/cache -->        to the end of the page: replaces the first text by the second
    <!-- test: before softcache train-teacher -->          for the next block: a command to run first
    <!-- test: background -->                              for the next block: its commands run in the background
    <!-- test: skip gpu -->                                for the next block: not run, for one of REASONS;
    <!-- test: skip gpu vllm serve -->                     or only its lines with this beginning

`$PORT` in a `where` is a free port, the same for a whole page. A block after a line that ends in `NAME.py`: is written to
(or appended to) that file, and so with .toml. In a `console` block lines that begin with `$ ` are commands, and the others
their output; `…` in it matches anything.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.caches import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = {
    "checkout": "works on the checkout that the tests run from, as the CI does",
    "gpu": "needs a GPU",
    "hours": "is a measurement whose smallest useful size takes too long, or too much memory, for a test",
    "page": "is run word for word by tests/docs/test_extend.py, in an empty folder",
    "machines": "needs several machines, or a cluster's own software",
    "measured": "is a measurement whose parts have a test of their own",
    "server": "runs until it is stopped; tests/tools/test_browse.py asks its server",
    "shell": "is for another shell than bash",
    "yours": "needs what only the reader has, such as credentials",
}
SHELLS = {"sh", "bash", "console", "shell"}
PROGRAMS = (
    "softcache",
    "make",
    "python",
    "pip",
    "torchrun",
    "accelerate",
    "dask",
    "curl",
    "vllm",
    "helm",
    "export",
    "eval",
)
COMMAND = re.compile(rf"(?:[A-Z_]+=\S* )*(?:{'|'.join(PROGRAMS)}) ")


@dataclass(frozen=True)
class Block:
    """A block of a page, fenced or indented, and how it is run.

    Attributes:
        language: the word after the fence; empty for an indented block.
        file: the name of the file with this content.
        added: settings and options for its commands; None where they are not run.
        at_length: whether it is run by `make chaos` only.
        replacements: pairs of text of the page and its replacement.
        before: commands that are run first.
        background: whether its commands run in the background.
        skipped: pairs of the beginning of a line and the reason why it is not run.
    """

    language: str
    text: str
    file: str | None = None
    added: tuple[str, ...] | None = None
    at_length: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    before: tuple[str, ...] = ()
    background: bool = False
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def is_shell(self) -> bool:
        return self.language in SHELLS or (
            not self.language and any(COMMAND.match(line.strip().removeprefix("$ ")) for line in self.lines)
        )

    @property
    def lines(self) -> list[str]:
        """The lines, with continuation lines joined."""
        return re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, each without its comment and pipe."""
        if not self.is_shell:
            return []
        prompted = [line.removeprefix("$ ") for line in self.lines if line.startswith("$ ")]
        lines = [re.split(r"\s+[#|]\s", line)[0].strip() for line in prompted or self.lines]
        return lines if prompted else [line for line in lines if COMMAND.match(line + " ")]

    def reason(self, command: str) -> str | None:
        """Returns why a command is not run; None if it is."""
        return next((reason for start, reason in self.skipped if command.startswith(start)), None)

    @property
    def is_run(self) -> bool:
        return self.added is not None and any(self.reason(command) is None for command in self.commands)

    def substitute(self, text: str) -> str:
        """Returns the text to run: without skipped lines, with the replacements made."""
        kept = re.sub(r"\s*\\\n\s*", " ", text) if self.skipped else text
        lines = [line for line in kept.splitlines() if self.reason(line.strip().removeprefix("$ ")) is None]
        text = "\n".join(lines) + "\n"
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text


def blocks(text: str) -> list[Block]:
    """Returns the blocks of a page, in order."""
    found: list[Block] = []
    lines, at = text.splitlines(), 0
    lasting: dict = {"added": None, "at_length": False, "replacements": ()}
    defaults: dict = {"before": (), "background": False, "skipped": ()}
    following, last = dict(defaults), ""
    while at < len(lines):
        start, language = at, None
        if lines[at].startswith("<!-- test: "):
            end = next(n for n in range(at, len(lines)) if lines[n].endswith("-->"))
            comment = " ".join(line.strip() for line in lines[at : end + 1])
            _apply(comment.removeprefix("<!-- test: ").removesuffix("-->").strip(), lasting, following)
            at = end + 1
            continue
        if fence := re.fullmatch(r"```([\w-]*)", lines[at]):
            language, end = fence[1], lines.index("```", at + 1)
            body, at = lines[at + 1 : end], end + 1
        elif lines[at].startswith("    ") and (
            at == 0 or not lines[at - 1].strip() or lines[at - 1][:4] == "<!--"
        ):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            language, body = "", [line.removeprefix("    ") for line in lines[start:at]]
        if language is None:
            last = lines[at].strip() or last
            at += 1
            continue
        named = re.search(r"`([\w-]+\.(?:py|toml))`:$", last)
        found.append(
            Block(language, "\n".join(body).strip() + "\n", named and named[1], **lasting, **following)
        )
        following, last = dict(defaults), ""
    return found


def _apply(comment: str, lasting: dict, following: dict) -> None:
    """Applies one comment to the attributes of all later blocks, or of the following one."""
    if found := re.fullmatch(r"run( at length)?(?: with (.*))?", comment):
        lasting |= {"added": tuple((found[2] or "").split()), "at_length": bool(found[1])}
    elif found := re.fullmatch(r"where (.+?) is(?: (.*))?", comment):
        others = tuple(pair for pair in lasting["replacements"] if pair[0] != found[1])
        lasting["replacements"] = (*others, (found[1], found[2] or ""))
    elif found := re.fullmatch(r"before (.+)", comment):
        following["before"] = (*following["before"], found[1])
    elif comment == "background":
        following["background"] = True
    elif found := re.fullmatch(r"skip (\w+)(?: (.+))?", comment):
        following["skipped"] = (*following["skipped"], (found[2] or "", found[1]))
    else:
        raise ValueError(
            f"<!-- test: {comment} -->: expected run, where, before, background or skip; see tests/support/docs_pages.py"
        )


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
