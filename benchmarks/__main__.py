"""The benchmarks of reading and training, each in a process of its own.

    make bench            or    python -m benchmarks [--quick] [--out DIR] [NAME…]

DIR gets NAME.json and NAME.svg of each: capture, scheduling, reading, epochs, scale. docs/benchmarks.md shows copies:

    cp runs/benchmarks/*.svg docs/figures/

A benchmark that fails does not keep the others from running; the exit status shows that one did.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from softcache.runtime.logging import log_info

NAMES = ("capture", "scheduling", "reading", "epochs", "scale")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]…", type=click.Choice(NAMES))
@click.option("--quick", is_flag=True, help="Small sizes, to see that all of them run.")
@click.option("--out", default="runs/benchmarks", show_default=True, metavar="DIR", help="Where figures go.")
def main(names: tuple[str, ...], quick: bool, out: str) -> None:
    """Run the benchmarks, one after the other."""
    Path(out).mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names or NAMES:
        log_info(f"benchmarks.{name}")
        files = ["--json", f"{out}/{name}.json", "--plot", f"{out}/{name}.svg"]
        command = [sys.executable, "-m", f"benchmarks.{name}", *files, *(["--quick"] if quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; run them by name to see why")


if __name__ == "__main__":
    main()
