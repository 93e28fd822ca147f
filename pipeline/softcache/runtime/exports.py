"""Public names of a package that are imported at their first use, so that importing the package stays cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the `__getattr__` (PEP 562) of a package, whose `dir` lists the names from now on.

    Args:
        package: its name.
        homes: from a public name to the module that defines it, or to the module that it is.

    Raises (from what is returned):
        AttributeError: the package has no such name.
        MissingExtraError: the module needs a package that is in an extra, which is not installed.
    """

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(home)
        except ModuleNotFoundError as error:
            from softcache.errors import missing_extra

            raise missing_extra(error, f"{package}.{name}") from error
        return module if home.rpartition(".")[2] == name else getattr(module, name)

    module = sys.modules[package]
    vars(module)["__dir__"] = lambda: sorted({*vars(module), *homes})
    return get
