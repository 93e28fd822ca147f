"""What `accelerate launch` asks of a program by environment variables, compared with what the program does.

accelerate reads some of them, transformers others, and a program that sets the same thing itself overrides them without a
word. `accelerate config` writes them into a file that every later launch takes them from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError

from softcache.errors import ConfigError

__all__ = ["check_launcher"]

VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "cpu": "ACCELERATE_USE_CPU",
    "use_fsdp": "ACCELERATE_USE_FSDP",
    "use_deepspeed": "ACCELERATE_USE_DEEPSPEED",
    "use_megatron_lm": "ACCELERATE_USE_MEGATRON_LM",
    "use_parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
_BOOL = TypeAdapter(bool)
"""Knows the words for true and false that accelerate knows, which may not be installed."""


def check_launcher(of: str, does: Mapping[str, tuple[str, str]]) -> None:
    """Raises where `accelerate launch` was asked for what the program does not do.

    Args:
        of: names the program, for messages.
        does: by option of the launcher: what the program does, "no" for nothing of the kind; and how to have what the option
            asks for.

    Raises:
        ConfigError: an option is set, and not to what the program does.
    """
    for option, (done, advice) in does.items():
        asked = os.environ.get(VARIABLES[option], "").strip().lower()
        wanted = {"auto": "", "1": ""}.get(asked, asked) if option.endswith("_steps") else _plain(asked)
        if wanted not in ("", done):
            raise ConfigError(
                f"{of}: accelerate launch --{option} ({VARIABLES[option]}={asked}) would be ignored; expected {done!r}, "
                f"which is what is done here; {advice}, or leave it out of the launch and of `accelerate config`"
            )


def _plain(asked: str) -> str:
    """Returns "true" for all words for it, nothing for those for false or none, and any other word as it is."""
    try:
        return "true" if _BOOL.validate_strings(asked) else ""
    except ValidationError:
        return "" if asked == "none" else asked
