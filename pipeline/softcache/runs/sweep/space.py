"""From a trial's parameters to the config of one ordinary student run, and the space where the config names none.

    tables of the config, with the trial's values in their place -> RunConfig, checked as a file would be

Every value of the space is tried on the config before the first trial, and every student is built once, so that a space
with a wrong value costs no trial.
"""

from __future__ import annotations

from typing import Any

from softcache.config.load import build_config
from softcache.config.run import RunConfig
from softcache.config.sweep import SEARCH_PARAMETERS, Axis, Range
from softcache.errors import ConfigError, LabelError, SoftcacheError
from softcache.modalities import Data
from softcache.reader.cache import Cache
from softcache.tools.shrink import ShrinkSettings, can_lower_k, shrink_manifest

__all__ = [
    "Space",
    "baseline_params",
    "candidate",
    "checked_space",
    "default_space",
    "format_params",
    "format_value",
    "num_kept_classes",
]

Space = dict[str, Axis]
LOSSES = ("forward_kl", "reverse_kl", "jsd", "dkd")  # of the default space, where the data and the tail allow
TEMPERATURES = Range(1.0, 8.0, log=True)
ALPHAS = Range(0.1, 1.0)
LR_FACTOR = 3.0


def candidate(config: RunConfig, params: dict[str, Any], cache: Cache) -> RunConfig:
    """Returns the config with a trial's values in it; what it does not name stays as it is.

    Raises:
        ConfigError: the values do not go together, or not with the rest of the config.
    """
    tables = config.model_dump(exclude_unset=True, exclude={"sweep"})
    tables["source"].setdefault("modality", config.source.modality)
    for name, value in params.items():
        table, key = SEARCH_PARAMETERS[name].key.split(".")
        if name == "k":
            tables["labels"] = _labels(tables.get("labels", {}), value, cache)
        else:
            tables.setdefault(table, {})[key] = value
    if (
        tables.get("loss", {}).get("name", config.loss.name) != config.loss.name
    ):  # these are of the other loss
        tables["loss"] = {
            key: value for key, value in tables["loss"].items() if key not in config.loss.parameters
        }
    return build_config(tables, f"of a trial with {format_params(params)}").with_overrides(config.overrides)


def _labels(labels: dict[str, Any], k: int, cache: Cache) -> dict[str, Any]:
    if k == num_kept_classes(cache):  # the cache as it is
        return labels
    return labels | {"k": k} | ({"policy": "top_k"} if labels.get("policy") == "dense" else {})


def format_params(params: dict[str, Any]) -> str:
    """Returns `key = value` of every parameter, with the config's names."""
    return (
        ", ".join(f"{SEARCH_PARAMETERS[name].key} = {format_value(value)}" for name, value in params.items())
        or "no changes"
    )


def format_value(value: Any) -> str:
    """Returns a value as tables and messages show it; a run has all of its digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def num_kept_classes(cache: Cache) -> int:
    """Returns how many classes a row of the cache has."""
    return int(cache.manifest.identity["labels"]["k"])


def baseline_params(config: RunConfig, space: Space, cache: Cache) -> dict[str, Any] | None:
    """Returns the parameters that the config has itself; None if the space does not hold them."""
    values = {
        "temperature": config.loss.temperature,
        "alpha": config.loss.alpha,
        "loss": config.loss.name,
        "k": num_kept_classes(cache),
        "lr": config.train.lr,
        "student": config.student.model,
    }
    own = {name: values[name] for name in space}
    return own if all(_contains(axis, own[name]) for name, axis in space.items()) else None


def _contains(axis: Axis, value: Any) -> bool:
    if isinstance(axis, Range):
        return axis.low <= value <= axis.high
    return value in axis


def default_space(config: RunConfig, data: Data, cache: Cache) -> Space:
    """Returns the default search space: every parameter that the cache leaves open.

    Temperature 1 to 8 and alpha 0.1 to 1; three or four losses; K, a half and a quarter of it; the learning rate up and
    down by a factor of three; the architectures of student.models, where the config names them.
    """
    space: Space = {}
    drawn = cache.manifest.build_codec().sampling is not None
    if not drawn:  # classes that were drawn serve the temperature that they were drawn for
        space["temperature"] = TEMPERATURES
    space["alpha"] = ALPHAS
    losses = dict.fromkeys((config.loss.name, *LOSSES))
    space["loss"] = tuple(name for name in losses if _is_allowed(config, name, cache))
    whole = num_kept_classes(cache)
    if can_lower_k(cache):
        space["k"] = tuple(sorted({k for k in (whole, whole // 2, whole // 4) if k >= 1}))
    space["lr"] = Range(config.train.lr / LR_FACTOR, config.train.lr * LR_FACTOR, log=True)
    models = config.student.models if "models" in config.student.model_fields_set else ()
    space["student"] = tuple(dict.fromkeys((config.student.model, *models)))
    return {name: axis for name, axis in space.items() if isinstance(axis, Range) or len(axis) > 1}


def _is_allowed(config: RunConfig, loss: str, cache: Cache) -> bool:
    try:
        candidate(config, {"loss": loss}, cache)
    except ConfigError:
        return False
    return True


def checked_space(config: RunConfig, data: Data, cache: Cache) -> Space:
    """Returns the config's space, or the default one, after a look at every name and both ends of every range.

    Raises:
        ConfigError: a value does not go with the rest of the config, with the cache, or names no student.
    """
    given = config.sweep.space
    space = default_space(config, data, cache) if given is None else dict(given.named())
    for name, axis in space.items():
        for value in (axis.low, axis.high) if isinstance(axis, Range) else axis:
            try:
                settings = candidate(config, {name: value}, cache)
                if name == "k":
                    _check_kept(int(value), cache)
                if name == "student":
                    data.task(settings, settings.student.model).build()
                    data.check_student(settings.student.model, cache)
            except SoftcacheError as error:
                raise ConfigError(f"sweep.space.{name}: {value!r} cannot be tried: {error}") from error
    return space


def _check_kept(k: int, cache: Cache) -> None:
    if k > num_kept_classes(cache):
        raise LabelError(
            f"cache {cache.url} keeps {num_kept_classes(cache)} classes of each row; ask for at most that, or capture with "
            "a larger labels.k"
        )
    if k < num_kept_classes(cache):
        shrink_manifest(cache, ShrinkSettings(k=k))
