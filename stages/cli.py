"""The `softcache` command: one subcommand per stage.

Exit codes: 0 done, 1 a softcache error (one readable message on stderr), 2 wrong usage, 130 and 143 stopped by SIGINT
and SIGTERM (a line on stderr explains how to go on). Of a run of many processes, rank 0 prints; an error is printed by the
process that raised it.
"""

import io
import os
import shlex
import sys
from contextlib import suppress

import click

from softcache import __version__
from softcache.errors import SoftcacheError
from softcache.runtime.distributed import claim_error_report, is_rank_zero
from softcache.runtime.logging import log_event
from softcache.runtime.signals import Interrupted, handle_signals
from softcache.runtime.threads import share_cores

from .commands import LazyCommands
from .completion import COMPLETE_VAR

__all__ = ["main", "softcache"]


OF_THE_MACHINE = {
    "No usable temporary directory": "no folder for temporary files can be written; set TMPDIR to one that can, such as a "
    "volume of the container",
    "failed to map segment": "a library cannot be loaded, for lack of memory; raise the limit (ulimit -v, the container's)",
}
"""What to do where Python or the loader of libraries fails before softcache comes to it, by a part of what they say."""


@click.group(
    cls=LazyCommands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(__version__, prog_name="softcache")
def softcache() -> None:
    """Offline soft-label caching for knowledge distillation: one teacher pass, many students."""


def main() -> None:
    # So that `module:factory` finds the user's own modules; last, so that they hide nothing.
    if "" not in sys.path:
        sys.path.append("")
    if sys.argv[1:2] == ["teacher-logits"]:
        share_cores()
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # as stderr has it: a locale that lacks a character is no reason to fail
        with suppress(OSError):  # of what is written to and read, at once
            sys.stdout.reconfigure(errors="backslashreplace")
    if not is_rank_zero():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with handle_signals():
        try:
            softcache(complete_var=COMPLETE_VAR)
        except SoftcacheError as error:
            if claim_error_report():
                log_event("error", f"softcache: {error}", kind=type(error).__name__, message=str(error))
            sys.exit(1)
        except Interrupted as stopped:
            again = shlex.join(["softcache", *sys.argv[1:]])
            text = f"softcache: {stopped}; what is finished is kept, and the same command goes on: {again}"
            if is_rank_zero():
                log_event("interrupted", text, signal=stopped.signum, resume=again)
            sys.exit(stopped.exit_code)
        except Exception as error:
            known = next((to_do for said, to_do in OF_THE_MACHINE.items() if said in str(error)), None)
            if claim_error_report():
                if known is None or not isinstance(error, OSError | ImportError):
                    raise
                text = f"{known} ({error})"
                log_event("error", f"softcache: {text}", kind=type(error).__name__, message=text)
            sys.exit(1)


if __name__ == "__main__":
    main()
