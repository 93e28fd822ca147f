"""What is known of timm's weights before they are loaded: `NAME`, `hf-hub:OWNER/NAME`, `local-dir:FOLDER`."""

from __future__ import annotations

from typing import Any

from softcache.errors import SpecError
from softcache.models.spec import ModelSpec

__all__ = ["has_source", "timm_config"]

SOURCES = ("hf-hub", "hf_hub", "local-dir")


def has_source(name: str) -> bool:
    """Returns whether the name of a timm model has its source, from which its weights come."""
    return name.partition(":")[0].lower() in SOURCES


def timm_config(parsed: ModelSpec, *, needs_weights: bool = True) -> dict[str, Any] | None:
    """Returns the `pretrained_cfg` of a timm model, with what the spec overlays; None where it has none.

    Args:
        needs_weights: one without weights, which has timm's defaults for the architecture, is None, too.

    Raises:
        SpecError: a folder or a repository of the hub has none.
    """
    import timm
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    overlay = parsed.args.get("pretrained_cfg_overlay") or {}
    if not has_source(parsed.name):
        config = timm.get_pretrained_cfg(parsed.name, allow_unregistered=True)
        if config is None or (needs_weights and not config.has_weights):
            return None
        return config.to_dict() | overlay
    source, _, place = parsed.name.partition(":")
    try:
        if source.lower() == "local-dir":
            return load_model_config_from_path(place)[0] | overlay
        return load_model_config_from_hf(place, cache_dir=parsed.args.get("cache_dir"))[0] | overlay
    except Exception as error:  # the hub, JSON, and the file system have errors of their own
        raise SpecError(
            f"model timm:{parsed.name}: {type(error).__name__}: {error}; expected a config.json as timm's save_for_hf and "
            "push_to_hf_hub write it"
        ) from error
