"""What differs between runs: the settings that vary, by their names in a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softcache.runs.report.load import Run

__all__ = ["SEED", "describe_settings", "differing_settings", "format_setting", "settings_of", "short_name"]

SEED = "train.seed"
SHORT = {"loss.name": "loss", "loss.temperature": "T", "loss.alpha": "alpha", SEED: "seed"}
NOT_SETTINGS = (
    "model",
    "cache",
    "source",
    "views",
    "evaluation",
    "tokenizer",
    "cross_documents",
    "student_data",
)
"""Parts of a run's identity that are no settings of its training: architecture, labels, data (and train.labels)."""


def settings_of(run: Run) -> dict[str, Any]:
    """Returns the settings of a run by dotted name, of those that its identity has."""
    found = _flat({name: part for name, part in run.identity.items() if name not in NOT_SETTINGS}, "")
    return {name: value for name, value in found.items() if name != "train.labels"}


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the settings that differ between runs, of those that they have.

    What only runs on some labels have is compared between those: there is no loss on the ground truth.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for run in runs:
        for name, value in settings_of(run).items():
            found.setdefault(name, {}).setdefault(run.labels, []).append(value)

    def differs(of_labels: dict[str, list[Any]]) -> bool:
        given = [value for values in of_labels.values() for value in values if value is not None]
        return any(value != values[0] for values in [given, *of_labels.values()] for value in values)

    return [name for name, of_labels in found.items() if differs(of_labels)]


def describe_settings(run: Run, names: Sequence[str]) -> str:
    """Returns the values of some settings in words: `T = 4, alpha = 0.5`."""
    own = settings_of(run)
    return ", ".join(f"{short_name(name)} = {format_setting(own[name])}" for name in names if name in own)


def short_name(name: str) -> str:
    """Returns a setting's name as a column or a run's name has it."""
    return SHORT.get(name, name.partition(".")[2] or name)


def format_setting(value: Any) -> str:
    """Returns a value as tables show it.

    >>> format_setting(0.30000001), format_setting(None), format_setting([1, 2])
    ('0.3', '–', '[1, 2]')
    """
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in table.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out
