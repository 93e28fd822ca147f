"""The registry of sources, and the base of the [source] tables that they are.

A source is a settings class with a method that reads it, registered under its modality and name:

    @SOURCES.register("image/clusters")
    class Clusters(ImageSourceSettings):
        num_clusters: int = 10

        def open(self, split): ...

`[source] name` finds it by that name, as `package.module:Clusters`, or by an entry point `image/clusters` of the group
`softcache.sources`. The keys of the table are the fields of the class; any other is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from softcache.errors import ConfigError, SoftcacheError, SpecError
from softcache.runtime.registry import Registry, Variant
from softcache.runtime.suggest import did_you_mean
from softcache.settings import Settings

__all__ = [
    "SOURCES",
    "SourceSettings",
    "SourceTable",
    "Split",
    "built_in_sources",
    "open_source",
    "source_class",
    "source_settings",
    "source_table",
]

Split = Literal["train", "eval"]
CUSTOM = "custom"


class SourceSettings(Settings, ABC):
    """[source]: which data; a subclass for each source.

    The two maxima take the first so many samples of a split, in its order.

    Attributes:
        modality: the kind of data, such as "image" or "text"; "image" where it is left out.
        name: a built-in source of that modality, or `package.module:Name`.
        max_train_samples, max_eval_samples: take the first so many samples of a split.
    """

    modality: str
    name: str
    max_train_samples: int | None = Field(None, ge=1)
    max_eval_samples: int | None = Field(None, ge=1)

    def max_samples(self, split: Split) -> int | None:
        return self.max_train_samples if split == "train" else self.max_eval_samples

    @property
    def part_numbers(self) -> list[int]:
        """The parts that the source is of, of a corpus in parts; none for any other source."""
        return []

    @property
    def has_rollouts(self) -> bool:
        """Whether its samples are rollouts, whose tokens a policy sampled."""
        return False

    def describe(self) -> str:
        """Returns the source as a part of a run's name."""
        return self.name

    @abstractmethod
    def open(self, split: Split) -> Any:
        """Returns a split of the data.

        Raises:
            SourceError: its files are missing, truncated or of something else.
        """


SOURCES: Registry[Any] = Registry(
    "source", package="softcache.data.sources", group="softcache.sources", recursive=True
)
"""Settings classes by MODALITY/NAME; MODALITY/custom reads what a function of the user's returns."""


def source_class(modality: str, name: str) -> type[SourceSettings]:
    """Returns the settings class of a source.

    Args:
        name: registered for the modality, or `package.module:Name` of a settings class or of a function of the split.

    Raises:
        SpecError: there is none of that name, or it is neither of them.
    """
    if ":" not in name and name not in (known := names_of(modality)):
        hint = did_you_mean(name, known) or f"known: {', '.join(known)}"
        raise SpecError(f"source {name!r}: unknown; {hint} (a custom one is package.module:Name)")
    found, custom = SOURCES.get(name if ":" in name else f"{modality}/{name}"), f"{modality}/{CUSTOM}"
    if isinstance(found, type) and issubclass(found, SourceSettings):
        return found
    takes_functions = ":" in name and custom in SOURCES
    if callable(found) and takes_functions:
        return SOURCES.get(custom)
    function = ", or a function called with split=" if takes_functions else ""
    raise SpecError(
        f"source {name!r}: expected a subclass of softcache.data.SourceSettings{function}; found {found!r}"
    )


@dataclass(frozen=True)
class SourceTable(Variant):
    """Reads a [source] table by the settings of the source that `modality` and `name` choose; made by `source_table`."""

    class_of: Callable[[str, str], type[SourceSettings]]
    known: Callable[[], Iterable[type[SourceSettings]]]

    def models(self) -> Iterator[type[BaseModel]]:
        yield from self.known()

    def model_of(self, table: dict[str, Any]) -> type[BaseModel]:
        if not isinstance(name := table.get("name"), str):
            kind = "missing" if "name" not in table else "string_type"
            found = table if "name" not in table else name
            raise ValidationError.from_exception_data(
                "source", [{"type": kind, "loc": ("name",), "input": found}]
            )
        try:
            return self.class_of(str(table.get("modality", "image")), name)
        except ConfigError as error:
            raise self._errors([(("modality",), table["modality"], str(error))]) from error
        except SoftcacheError as error:
            raise self._errors([(("name",), name, str(error))]) from error


def source_table(
    class_of: Callable[[str, str], type[SourceSettings]], known: Callable[[], Iterable[type[SourceSettings]]]
) -> BeforeValidator:
    """Returns the pydantic validator of a [source] table, which its `modality` and `name` choose.

    Args:
        class_of: from a modality and a name to the settings class.
        known: returns those of the built-in sources, whose keys an error about an unknown key names.
    """
    return BeforeValidator(SourceTable(SOURCES, lambda chosen: chosen, "name", "", class_of, known))


def built_in_sources(modality: str = "") -> list[type[SourceSettings]]:
    """Returns the settings classes of the built-in sources, of one modality or of all."""
    return [chosen for key, chosen in SOURCES.items() if key.startswith(modality)]


def names_of(modality: str) -> list[str]:
    """Returns the names of a modality's sources, sorted."""
    names = [key.partition("/")[2] for key in SOURCES.names() if key.startswith(f"{modality}/")]
    return [name for name in names if name != CUSTOM]


def source_settings(table: Mapping[str, Any]) -> SourceSettings:
    """Returns the settings of a [source] table; `modality` is "image" where it has none.

    Raises:
        SpecError: there is no source of that name.
        ValidationError: a key is unknown, missing, mistyped or out of range.
    """
    if not isinstance(name := table.get("name"), str):
        return SourceSettings.model_validate({"modality": "image", **table})
    chosen = source_class(table.get("modality", "image"), name)
    return chosen.model_validate(dict(table))


def open_source(source: SourceSettings | Mapping[str, Any], *, split: Split) -> Any:
    """Returns a split of a source: of images, texts, pairs of texts or images with boxes, by its modality.

    Args:
        source: `config.source`, or a table such as {"name": "digits"}.

    Raises:
        SpecError: there is no source of that name.
        SourceError: its files are missing, truncated or of something else.
    """
    settings = source if isinstance(source, SourceSettings) else source_settings(source)
    return settings.open(split)
