"""Prints the tables of docs/reliability.md, section Alignment: every perturbation is made, and what came of it is written down.

python -m tests.support.alignment_table            # half a minute on one core; exit code 1 if something is not as expected
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from tests.support.alignment import Found, Worlds, attempt
from tests.support.alignment_cases import (
    HARMLESS,
    REFUSED,
    Harmless,
    Refused,
    is_harmless,
    is_refused,
)
from tests.support.alignment_elsewhere import ELSEWHERE, copies

__all__ = ["harmless_row", "refused_row"]

KINDS = {
    "images": "images in memory",
    "files": "image files",
    "text": "packed text",
    "chats": "chats",
}


def refused_row(case: Refused, found: Found) -> str:
    message = found.messages[0].removeprefix("softcache: ") if found.messages else found.err[-80:]
    message = re.sub(r"^cache cache: ", "", message).split("; ")[0]
    when = "when the batch is read" if case.under_way else "before the first step"
    verdict = (
        f"`{message}`" if is_refused(case, found) else f"**not as expected**: exit {found.code}, `{message}`"
    )
    return f"| {KINDS[case.kind]} | {case.name} | refused {when} | {verdict} |"


def harmless_row(case: Harmless, verdicts: list[bool]) -> str:
    expected = "same batches" if case.same_batches else "same samples, views and labels in each epoch"
    kinds = ", ".join(KINDS[kind] for kind in case.kinds)
    return f"| {kinds} | {case.name} | {expected} | {'the same' if all(verdicts) else '**not the same**'} |"


def main() -> int:
    lines = ["| data | perturbation | expected | found |", "|---|---|---|---|"]
    more = list(lines)
    with tempfile.TemporaryDirectory() as folder:
        worlds, untouched = Worlds(Path(folder)), {}
        for kind in KINDS:
            with worlds.copy(kind) as world:
                untouched[kind] = attempt(world)
        for case in REFUSED:
            with worlds.copy(case.kind) as world:
                case.change(world)
                lines.append(refused_row(case, attempt(world)))
        for harmless in HARMLESS:
            verdicts = []
            for kind in harmless.kinds:
                with worlds.copy(kind) as world:
                    harmless.change(world)
                    verdicts.append(is_harmless(harmless, attempt(world), untouched[kind]))
            more.append(harmless_row(harmless, verdicts))
        made = copies(worlds, Path(folder) / "copies")
        for name, expected, is_same in ELSEWHERE:
            verdict = is_same(made, Path(folder) / name.split()[0], untouched)
            kinds = ", ".join(KINDS[kind] for kind, _, _ in made)
            more.append(
                f"| {kinds} | {name} | {expected} | {'the same' if verdict else '**not the same**'} |"
            )
    print("\n".join(lines), "\n".join(more), sep="\n\n")
    return int("**not" in "".join(lines + more))


if __name__ == "__main__":
    sys.exit(main())
