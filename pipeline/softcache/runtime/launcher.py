"""What `accelerate launch` asks of a program by environment variables, compared with what the program does.

accelerate reads some of them, transformers others, and a program that sets the same thing itself overrides them without a
word. `accelerate config` writes them into a file that every later launch takes them from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

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
_NONE = ("", "no", "none", "false", "f", "n", "off", "0")
_TRUE = ("true", "t", "yes", "y", "on", "1")


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
        none = ("", "auto", "1") if option == "gradient_accumulation_steps" else _NONE
        if asked not in (*none, done) and not (done == "true" and asked in _TRUE):
            raise ConfigError(
                f"{of}: accelerate launch --{option} ({VARIABLES[option]}={asked}) would be ignored; expected {done!r}, "
                f"which is what is done here; {advice}, or leave it out of the launch and of `accelerate config`"
            )
