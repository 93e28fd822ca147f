"""The outputs of a classifier that stand for the classes of a source: a teacher of 1,000 classes labels 10 of them.

`teacher.class_map` is a JSON file, or "auto":

    {"tench": 0, "English springer": 217, …}    by the source's class names
    [0, 217, …]                                 in the order of the source's classes
    auto                                        by the names that the teacher's weights come with: ImageNet's synsets
                                                (n01440764) of timm's models, the categories of torchvision's weights,
                                                id2label of transformers' models

The labels are the softmax over the chosen outputs: what the teacher believes, given that it is one of the source's classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from softcache.errors import ConfigError
from softcache.models.hugging_face import hf_output_names, hf_scheme
from softcache.models.spec import ModelSpec
from softcache.models.torchvision_weights import published_weights
from softcache.runtime.files import parse_json
from softcache.runtime.logging import log_info
from softcache.runtime.suggest import closest_matches

__all__ = ["check_class_order", "output_names", "read_class_map"]


def output_names(model: nn.Module, parsed: ModelSpec, file: str | None = None) -> list[str]:
    """Returns the names of a model's outputs that its weights come with; empty where they are not known.

    Args:
        file: that its weights are from; one that torchvision publishes is known.
    """
    if hf_scheme(parsed):
        return hf_output_names(parsed)
    if parsed.family == "timm":
        from timm.data import ImageNetInfo, infer_imagenet_subset

        names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
        subset = None if names else infer_imagenet_subset(model)
        return list(names or (ImageNetInfo(subset).label_names() if subset else []))
    published = published_weights(parsed, file)
    return [] if published is None else list(published.meta.get("categories", []))


def check_class_order(
    class_names: Sequence[str], names: Sequence[str], *, spec: str, order_is_guessed: bool = False
) -> None:
    """Checks that the outputs of a teacher without a class map are the source's classes, in their order, as far as is known.

    Args:
        class_names: [V] of the source.
        names: [V] of the outputs; empty where they are not known.
        order_is_guessed: the source has sorted its classes, and timm would sort them differently.

    Raises:
        ConfigError: they are not, or the order of the classes has to be given.
    """
    plain = [[_plain(name) for name in part] for part in (class_names, names)]
    if plain[0] == plain[1]:
        return
    if set(plain[0]) & set(plain[1]):
        number, here, there = next(
            (number, here, there)
            for number, (here, there) in enumerate(zip(class_names, names, strict=True))
            if _plain(here) != _plain(there)
        )
        raise ConfigError(
            f"teacher.model {spec}: its outputs are other classes, or in another order: class {number} of the source is "
            f'{here!r}, output {number} is {there!r}; set teacher.class_map = "auto" (by names), or to a JSON file'
        )
    if order_is_guessed:
        known = "not known" if not names else f"that of other names ({', '.join(names[:3])}, …)"
        raise ConfigError(
            f"teacher.model {spec}: the order of its outputs is {known}, and the source's classes are sorted as texts "
            f"({', '.join(class_names[:3])}, …), which timm's scripts sort by number and without regard to case; set "
            'source.class_order to "natural" (timm) or "lexicographic" (torchvision, ImageFolder), or source.class_names'
        )
    if names:
        log_info(
            f"teacher {spec}: its outputs are called otherwise than the source's classes ({names[0]!r} for "
            f"{class_names[0]!r}, {names[-1]!r} for {class_names[-1]!r}); they are taken to be the same, in the same order"
        )


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def read_class_map(
    setting: str, class_names: Sequence[str], *, num_outputs: int, names: Sequence[str], spec: str
) -> tuple[int, ...]:
    """Returns the number of the output of each class of a source.

    Args:
        setting: `teacher.class_map`.
        class_names: [V] of the source.
        num_outputs: of the teacher.
        names: of its outputs, where they are known.

    Raises:
        ConfigError: a class has no output, several have one, or an output is none of the teacher's.
    """
    what = f"teacher.class_map: {setting}"
    if setting == "auto":
        if len(names) != num_outputs:
            raise ConfigError(
                f"{what}: {spec} comes without the names of its {num_outputs:,} outputs; name a JSON file with the "
                "output of each class"
            )
        several = Counter(names)
        for name in (name for name in class_names if several[name] > 1):
            raise ConfigError(
                f"{what}: {name!r} is the name of several outputs of {spec}; name a JSON file with the output of each class"
            )
        found: Any = {name: names.index(name) for name in class_names if name in names}
    else:
        try:
            found = parse_json(Path(setting).read_text(encoding="utf-8-sig"), object_pairs_hook=_once_each)
        except (OSError, ValueError) as error:
            raise ConfigError(f'{what}: {error}; expected a JSON file, or "auto"') from error
    if isinstance(found, list) and len(found) == len(class_names):
        return _checked(found, class_names, num_outputs, what, spec)
    if not isinstance(found, dict):
        length = f" of {len(found)}" if isinstance(found, list) else ""
        raise ConfigError(
            f"{what}: expected an object of class names, or a list of {len(class_names)} numbers, one for each class; found "
            f"a {type(found).__name__}{length}"
        )
    for name in (name for name, count in Counter(class_names).items() if count > 1):
        raise ConfigError(
            f"{what}: {name!r} is the name of several classes of the source; give a list of {len(class_names)} numbers, in "
            "the order of its classes"
        )
    for absent in (name for name in class_names if name not in found):
        near = closest_matches(absent, list(names if setting == "auto" else found), most=3)
        raise ConfigError(
            f"{what}: class {absent!r} of the source has no output"
            + (f"; nearest: {', '.join(near)}" if near else "")
            + "; give each class the number of its output in a JSON file"
        )
    for extra in (name for name in found if name not in class_names):
        raise ConfigError(f"{what}: {extra!r} is no class of the source; drop it, or correct its name")
    return _checked([found[name] for name in class_names], class_names, num_outputs, what, spec)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises ValueError where it has a key twice, of which json takes the last."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{key!r} comes twice")
    return dict(pairs)


def _checked(
    outputs: list[Any], class_names: Sequence[str], num_outputs: int, what: str, spec: str
) -> tuple[int, ...]:
    """Returns the outputs of the classes; raises ConfigError where one is none of the teacher's, or of several."""
    taken = Counter(map(repr, outputs))
    for name, output in zip(class_names, outputs, strict=True):
        if type(output) is not int or not 0 <= output < num_outputs:
            raise ConfigError(
                f"{what}: class {name!r} has output {output!r}; {spec} has outputs 0 to {num_outputs - 1}"
            )
        if taken[repr(output)] > 1:
            raise ConfigError(
                f"{what}: output {output} stands for several classes ({name!r} is one); expected one for each, because the "
                "mass of an output cannot be shared between classes"
            )
    return tuple(outputs)
