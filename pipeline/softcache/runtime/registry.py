"""Named variants that users can extend: losses, label policies, codecs, sources, modalities.

A registry is the one idiom for all of them. A variant is a class or a function in a file of its own, registered by a
decorator under its name:

    LOSSES = Registry("loss", package="softcache.losses.divergences", group="softcache.losses")

    @LOSSES.register("forward_kl")
    def forward_kl(...): ...

`get` finds it by that name, by `package.module:Name` of the user's own, or by the name or value of an entry point of the
group `softcache.losses` in an installed package. The modules of `package` are imported at the first lookup, so a new
variant is one new file.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import PydanticCustomError

from softcache.errors import SoftcacheError, SpecError
from softcache.runtime.suggest import did_you_mean

__all__ = ["Registry", "Variant", "variant"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Variants of one kind by name.

    Args:
        kind: what error messages call one of them, such as "loss" or "label policy".
        package: the package whose modules register the built-in variants, or one module that does; imported at the first
            lookup.
        group: the entry-point group of other packages' variants, such as `softcache.losses`.
        error: what is raised for an unknown name.
        recursive: whether the modules of the package's subpackages are imported, too.
        subclass_of, instance_of: what a variant of the user's or of another package must be; None for no check.
    """

    def __init__(
        self,
        kind: str,
        *,
        package: str,
        group: str,
        error: type[Exception] = SpecError,
        recursive: bool = False,
        subclass_of: type | None = None,
        instance_of: type | None = None,
    ) -> None:
        self.kind, self.group, self._is_recursive = kind, group, recursive
        self._package, self._error = package, error
        self._subclass_of, self._instance_of = subclass_of, instance_of
        self._variants: dict[str, T] = {}
        self._custom: dict[str, T] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Returns the decorator that registers a variant under a name.

        Raises:
            ValueError: another variant has this name.
        """

        def decorate(variant: T) -> T:
            if self._variants.setdefault(name, variant) is not variant:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            return variant

        return decorate

    def names(self) -> list[str]:
        """Returns the names of the built-in variants and of the installed packages', sorted."""
        self._load()
        return sorted({*self._variants, *(point.name for point in _entry_points(self.group))})

    def add_custom(self, path: str, variant: T) -> None:
        """Makes a custom variant known under `package.module:Name`, for names that come from untrusted files."""
        self._custom[path] = variant

    def get(self, name: str, *, trusted: bool = True) -> T:
        """Returns the variant of a name: registered, `package.module:Name`, or an entry point.

        Args:
            trusted: whether the name comes from the user. A name from a file of others imports no module: a
                `package.module:Name` is then found only if this process has looked it up or added it before.

        Raises:
            SpecError (or this registry's `error`): there is none, its module cannot be imported, or what it names is
                no variant of this registry.
        """
        self._load()
        if name in self._variants:
            return self._variants[name]
        if name in self._custom:
            return self._custom[name]
        if ":" in name and trusted:
            self._custom[name] = self._import(name)
            return self._custom[name]
        for point in _entry_points(self.group):
            if name in (point.name, point.value):
                return self._import(point.value)
        hint = did_you_mean(name, self.names()) or f"known: {', '.join(self.names())}"
        raise self._error(f"{self.kind} {name!r}: unknown; {hint} (a custom one is package.module:Name)")

    def items(self) -> Iterator[tuple[str, T]]:
        """Yields the built-in variants with their names, in the order of their names."""
        self._load()
        yield from sorted(self._variants.items())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._variants

    def _import(self, path: str) -> T:
        module, _, attribute = path.partition(":")
        try:
            found: T = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise self._error(
                f"{self.kind} {path!r}: expected package.module:Name that can be imported; found {error}"
            ) from error
        if problem := self._problem(found):
            raise self._error(f"{self.kind} {path!r}: {problem}")
        return found

    def _problem(self, found: Any) -> str | None:
        """Returns why something is no variant of this registry; None if it is one."""
        if (base := self._subclass_of) is not None:
            if not (isinstance(found, type) and issubclass(found, base)):
                return f"expected a subclass of {base.__module__}.{base.__name__}; found {_described(found)}"
            if missing := sorted(getattr(found, "__abstractmethods__", ())):
                return f"expected a class that defines {', '.join(missing)}, as every {self.kind}"
        if (base := self._instance_of) is not None and not isinstance(found, base):
            return f"expected a {base.__module__}.{base.__name__}; found {_described(found)}"
        return None

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True
        package = importlib.import_module(self._package)
        find = pkgutil.walk_packages if self._is_recursive else pkgutil.iter_modules
        try:
            for module in find(getattr(package, "__path__", ()), f"{self._package}."):
                importlib.import_module(module.name)
        except BaseException:  # the next lookup must not take the part that was imported for the whole
            self._is_loaded = False
            raise


def _entry_points(group: str) -> EntryPoints:
    """Returns the installed packages' entry points of a group, read again once a folder of sys.path changes."""
    folders = []
    for path in sys.path:
        try:
            found = os.stat(path or ".")
        except OSError:
            continue
        folders.append((path, found.st_ino, found.st_mtime_ns))
    return _read_entry_points(group, tuple(folders))


@lru_cache(maxsize=64)
def _read_entry_points(group: str, folders: tuple[tuple[str, int, int], ...]) -> EntryPoints:
    return entry_points(group=group)


def _described(found: Any) -> str:
    name = getattr(found, "__qualname__", None)
    return f"the {type(found).__name__} {name}" if isinstance(name, str) else repr(found)


@dataclass(frozen=True)
class Variant:
    """Reads a table by the settings of the variant that it names; made by `variant`."""

    registry: Registry[Any]
    settings_of: Callable[[Any], type[BaseModel]]
    key: str
    default: str

    def models(self) -> Iterator[type[BaseModel]]:
        """Yields the settings models of the built-in variants."""
        for _, chosen in self.registry.items():
            yield self.settings_of(chosen)

    def model_of(self, table: dict[str, Any]) -> type[BaseModel]:
        """Returns the settings model that reads a table.

        Raises:
            ValidationError: no variant has the name that the table has, or the variant has no settings model.
        """
        name = table.get(self.key, self.default)
        try:
            chosen = self.registry.get(name if isinstance(name, str) else self.default)
            model = self.settings_of(chosen)
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                raise SpecError(
                    f"{self.registry.kind} {name!r}: its settings: expected a subclass of softcache.settings.Settings; "
                    f"found {_described(model)}"
                )
        except SoftcacheError as error:
            raise self._errors([((self.key,), name, str(error))]) from error
        return model

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name, model = value.get(self.key, self.default), self.model_of(value)
        try:
            return model.model_validate(value)
        except ValidationError as error:
            unknown = [
                (found["loc"], found["input"], self._unknown_key(str(found["loc"][0]), name, model))
                for found in error.errors()
                if found["type"] == "extra_forbidden" and len(found["loc"]) == 1
            ]
            if not unknown:
                raise
            raise self._errors(unknown) from error

    def _unknown_key(self, key: str, name: str, model: type[BaseModel]) -> str:
        known = list(model.model_fields)
        hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
        return f"unknown key with {self.key} = {name!r}; {hint}"

    def _errors(self, problems: Sequence[tuple[tuple[int | str, ...], Any, str]]) -> ValidationError:
        return ValidationError.from_exception_data(
            self.registry.kind,
            [
                {
                    "type": PydanticCustomError("variant", "{message}", {"message": message}),
                    "loc": loc,
                    "input": given,
                }
                for loc, given, message in problems
            ],
        )


def variant(
    registry: Registry[Any], settings_of: Callable[[Any], type[BaseModel]], *, key: str, default: str
) -> BeforeValidator:
    """Returns the pydantic validator of a table that is read by the settings of the variant that it names.

    A key that the chosen variant does not read is refused by its dotted name, as every unknown key is.

    Args:
        settings_of: from a variant to its settings model.
        key: the key of the table that holds the variant's name.
        default: the name where the table has none.

    A field that holds it: `Annotated[SerializeAsAny[LossSettings], variant(LOSSES, ..., key="name", default="kl")]`.
    """
    return BeforeValidator(Variant(registry, settings_of, key, default))
