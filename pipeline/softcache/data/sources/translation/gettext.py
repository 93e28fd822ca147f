"""Pairs from the gettext catalogues that an installed package ships: English to the languages asked for.

Every LANG/LC_MESSAGES/*.po below the package is read (*.mo where a catalogue has no .po), by Babel. An entry gives

    nothing       untranslated, obsolete or fuzzy; a side without a letter once its placeholders (%(name)s, %s, {name},
                  HTML tags) are taken away; a form of a plural that is missing
    one pair      the message and its translation; a context (msgctxt) distinguishes two meanings for the translator, and
                  is no part of the text
    two pairs     a plural: the singular with the form for n = 1, the plural with that for n = 5 (which is no dual)

White space at the ends is cut off. Of several translations of one English text into one language (other catalogues,
other contexts) the commonest is kept, of equally common ones the first by code point; so a key is LANG/HASH of the
English text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from gettext import c2py
from pathlib import Path
from typing import Any

from pydantic import Field

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.translation.settings import Languages, Pair, TranslationSettings
from softcache.errors import MissingExtraError, SourceError

__all__ = ["Gettext"]

PLACEHOLDER = re.compile(
    r"%\([^)]*\)[-#0 +]*\d*(?:\.\d+)?[a-zA-Z]|%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z%]|\{[^{}]*\}|<[^<>]*>"
)


@SOURCES.register("translation/gettext")
class Gettext(TranslationSettings):
    """The catalogs of an installed package, from English to `languages`.

    Attributes:
        package: installed Python package whose message catalogs are read.
    """

    name: str = "gettext"
    package: str
    languages: Languages = Field(min_length=1)

    def read(self, split: Split) -> tuple[str, list[Pair], bool]:
        """Returns the name of the source, its pairs in all languages, and that they are not cut into splits.

        Raises:
            SourceError: no such package, or none of its catalogs is of a language asked for.
            MissingExtraError: Babel is not installed.
        """
        folder = _folder_of(self.package)
        pairs = [pair for language in self.languages for pair in _pairs(folder, self.package, language)]
        return f"gettext/{self.package}", pairs, False


def _folder_of(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"source.package {package!r}: no such installed package; install one that ships catalogues, e.g. "
            "pip install 'softcache[translation]' for django"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _pairs(folder: Path, package: str, language: str) -> list[Pair]:
    files = _catalogues(folder, language)
    if not files:
        there = sorted({path.parent.parent.name for path in folder.rglob("LC_MESSAGES/*.?o")})
        raise SourceError(
            f"source.languages: package {package} has no catalogue LANG/LC_MESSAGES/*.po or *.mo for {language!r}; it has "
            f"{', '.join(there) or 'none at all'}"
        )
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for path in files:
        for source, target in _entries(path, language):
            found[source][target] += 1
    if not found:
        raise SourceError(
            f"source.languages: {language!r}: nothing is translated in {package}; name another language"
        )
    pairs = []
    for source, targets in sorted(found.items()):
        target = min(targets, key=lambda text: (-targets[text], text))
        key = f"{language}/{hashlib.sha256(source.encode()).hexdigest()[:16]}"
        pairs.append(Pair(key, source, target, language))
    return pairs


def _catalogues(folder: Path, language: str) -> list[Path]:
    texts = sorted(folder.rglob(f"{language}/LC_MESSAGES/*.po"))
    compiled = sorted(folder.rglob(f"{language}/LC_MESSAGES/*.mo"))
    return texts + [path for path in compiled if path.with_suffix(".po") not in texts]


def _entries(path: Path, language: str) -> Iterator[tuple[str, str]]:
    catalogue = _read(path)
    for message in catalogue:
        if not message.id or message.fuzzy:
            continue
        if isinstance(message.id, tuple | list):
            forms = message.string if isinstance(message.string, tuple | list) else (message.string,)
            # Which of a language's forms goes with n; a catalogue may have fewer forms than its rule.
            number_of = c2py(catalogue.plural_expr)
            sides = [(text, _form(forms, number_of(n))) for text, n in zip(message.id, (1, 5), strict=True)]
        else:
            sides = [(message.id, message.string)]
        for source, target in sides:
            pair = str(source).strip(), str(target or "").strip()
            if all(_has_letter(side) for side in pair):
                yield pair


def _form(forms: Sequence[str], number: int) -> str:
    return forms[number] if number < len(forms) else ""


def _has_letter(text: str) -> bool:
    return any(character.isalpha() for character in PLACEHOLDER.sub("", text))


def _read(path: Path) -> Any:
    try:
        from babel.messages.mofile import read_mo
        from babel.messages.pofile import read_po
    except ImportError as error:
        raise MissingExtraError(
            f"source gettext: it needs Babel ({error}); pip install 'softcache[translation]'"
        ) from error
    try:
        # Babel prints about plurals whose number of forms differs from the rule; they are dealt with above.
        with path.open("rb") as stream, redirect_stdout(io.StringIO()):
            return read_po(stream, ignore_obsolete=True) if path.suffix == ".po" else read_mo(stream)
    except Exception as error:
        # Babel raises many kinds of errors for a broken catalogue; the user needs to know which file it was.
        raise SourceError(
            f"source gettext: {path} cannot be read: {type(error).__name__}: {error}; reinstall the package"
        ) from error
