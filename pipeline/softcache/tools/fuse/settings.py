"""`[fusion]`: the caches that a student learns from together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from softcache.errors import LabelError
from softcache.settings import Settings
from softcache.tools.fuse.weights import Rule

__all__ = ["FusionSettings"]


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # TOML has lists only


class FusionSettings(Settings):
    """[fusion]: several teachers' caches, fused once into one that the student reads.

    Attributes:
        caches: paths or URLs; of one source, seen through the same views.
        rule: how they are fused (`softcache.tools.fuse.weights`).
        k: classes kept in each row; None: the most that one of the caches keeps.
        values: precision of the fused log-probabilities on disk.
        allow_weak_teachers: fuse also those at chance level, or far below the best (`compatibility.check_teachers`).
    """

    caches: Annotated[tuple[str, ...], BeforeValidator(_list_to_tuple)] = Field(min_length=2)
    rule: Rule = "mean"
    k: int | None = Field(None, ge=1)
    values: Literal["float16", "float32"] = "float16"
    allow_weak_teachers: bool = False

    def slots(self, kept: Sequence[int], num_classes: int) -> int:
        """Returns the slots of a fused row, of teachers that keep so many classes each.

        Raises:
            LabelError: there cannot be so many.
        """
        most = min(num_classes, sum(kept))
        k = self.k or max(kept)
        if k > most:
            raise LabelError(
                f"fusion.k: {k} classes asked for; the caches keep {' + '.join(map(str, kept))} of {num_classes}, so there "
                f"are at most {most}; ask for fewer"
            )
        return k
