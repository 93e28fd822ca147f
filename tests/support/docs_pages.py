"""The pages of the documentation, read block by block, with what their comments say of how a test runs them.

A page tells it in comments that readers do not see. Each holds from where it stands:

    <!-- test: run with train.epochs=1 --rounds=1 -->      to the end of the page, or until the next one: every command is
                                                           run, with these settings and options where it takes them and
                                                           does not say them itself; `run` alone adds nothing, and
                                                           `run at length with …` is for `make chaos`
    <!-- test: where CACHE is runs/digits/cache -->        to the end of the page: this stands where the page says that
    <!-- test: before softcache train-teacher -->          for the next block: what has to be there
    <!-- test: beside -->                                  for the next block: its commands go on beside what follows
    <!-- test: skip gpu -->                                for the next block: not run, for one of REASONS;
    <!-- test: skip gpu vllm serve -->                     or only its lines that begin so

`$PORT` in a `where` is a free port, the same for a whole page. A block after a line that ends in `NAME.py`: is (or is
added to) that file, and so with .toml. In a `console` block lines that begin with `$ ` are commands, and the others what
they print; `…` there stands for anything.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.caches import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = {
    "checkout": "works on the checkout that the tests run from, as the CI does",
    "gpu": "needs a GPU",
    "hours": "is a measurement whose smallest useful size takes too long, or more memory than a test may",
    "machines": "needs several machines, or a cluster's own software",
    "shell": "is for another shell than bash",
    "yours": "holds what only the reader has, such as credentials",
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
        language: what the fence says; empty for an indented block.
        file: the file that it is shown as.
        added: settings and options of its commands; None where nothing says that they are run.
        at_length: whether that is for `make chaos`.
        words: what stands where the page says something else.
        before: commands that come first.
        beside: whether its commands go on beside what follows.
        skipped: reasons by the beginning of the lines that they excuse.
    """

    language: str
    text: str
    file: str | None = None
    added: tuple[str, ...] | None = None
    at_length: bool = False
    words: tuple[tuple[str, str], ...] = ()
    before: tuple[str, ...] = ()
    beside: bool = False
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def is_shell(self) -> bool:
        return self.language in SHELLS or (
            not self.language and any(COMMAND.match(line.strip().removeprefix("$ ")) for line in self.lines)
        )

    @property
    def lines(self) -> list[str]:
        """The lines, continued ones in one."""
        return re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()

    @property
    def commands(self) -> list[str]:
        """The commands of a shell's block, each without its comment and what it is piped into."""
        if not self.is_shell:
            return []
        prompted = [line.removeprefix("$ ") for line in self.lines if line.startswith("$ ")]
        told = [re.split(r"\s+[#|]\s", line)[0].strip() for line in prompted or self.lines]
        return (prompted and told) or [line for line in told if COMMAND.match(line + " ")]

    def reason(self, command: str) -> str | None:
        """Returns why a command is not run; None if it is."""
        return next((reason for start, reason in self.skipped if command.startswith(start)), None)

    @property
    def is_run(self) -> bool:
        return self.added is not None and any(self.reason(command) is None for command in self.commands)

    def said(self, text: str) -> str:
        """Returns text as it is run: without the lines that are skipped, with `words` in their places."""
        kept = re.sub(r"\s*\\\n\s*", " ", text) if self.skipped else text
        lines = [line for line in kept.splitlines() if self.reason(line.strip().removeprefix("$ ")) is None]
        text = "\n".join(lines) + "\n"
        for word, value in self.words:
            text = text.replace(word, value)
        return text


def blocks(text: str) -> list[Block]:
    """Returns the blocks of a page, in order."""
    found: list[Block] = []
    lines, at = text.splitlines(), 0
    lasting: dict = {"added": None, "at_length": False, "words": ()}
    once: dict = {"before": (), "beside": False, "skipped": ()}
    told, last = dict(once), ""
    while at < len(lines):
        start, language = at, None
        if lines[at].startswith("<!-- test: "):
            end = next(n for n in range(at, len(lines)) if lines[n].endswith("-->"))
            comment = " ".join(line.strip() for line in lines[at : end + 1])
            _hear(comment.removeprefix("<!-- test: ").removesuffix("-->").strip(), lasting, told)
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
        found.append(Block(language, "\n".join(body).strip() + "\n", named and named[1], **lasting, **told))
        told, last = dict(once), ""
    return found


def _hear(comment: str, lasting: dict, told: dict) -> None:
    """Takes what one comment says into what lasts and what is told of the next block."""
    if said := re.fullmatch(r"run( at length)?(?: with (.*))?", comment):
        lasting |= {"added": tuple((said[2] or "").split()), "at_length": bool(said[1])}
    elif said := re.fullmatch(r"where (.+?) is(?: (.*))?", comment):
        others = tuple(pair for pair in lasting["words"] if pair[0] != said[1])
        lasting["words"] = (*others, (said[1], said[2] or ""))
    elif said := re.fullmatch(r"before (.+)", comment):
        told["before"] = (*told["before"], said[1])
    elif comment == "beside":
        told["beside"] = True
    elif said := re.fullmatch(r"skip (\w+)(?: (.+))?", comment):
        told["skipped"] = (*told["skipped"], (said[2] or "", said[1]))
    else:
        raise ValueError(
            f"<!-- test: {comment} -->: expected run, where, before, beside or skip; see tests/support/docs_pages.py"
        )


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
