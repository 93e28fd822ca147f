"""What a student makes of a view that the teacher saw: smaller, grey, with a mean and std of its own.

The teacher's view is replayed first, pixel by pixel, and then reduced. So a student's view v is the teacher's view v,
whatever [views] does, and its label is of the same crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from softcache.data.transforms import Floats, Views
from softcache.data.transforms import ops as view_ops
from softcache.errors import SpecError
from softcache.hashing.digests import digest_json
from softcache.settings import Settings

__all__ = ["StudentViewSettings", "StudentViews"]


class StudentViewSettings(Settings):
    """[student.views]: how the teacher's view is reduced.

    `size` is the shorter side in pixels (None: as it is); `grey` makes one channel of three; `mean` and `std` (None: those
    of [views], of the grey image their average) normalise what the student sees.
    """

    size: int | None = Field(None, ge=1, le=16384)
    grey: bool = False
    mean: Floats | None = None
    std: Floats | None = None

    def normalization(self, views: Views) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and std of the student's channels."""
        chosen = []
        for own, theirs in ((self.mean, views.settings.mean), (self.std, views.settings.std)):
            chosen.append(own or ((sum(theirs) / len(theirs),) if self.grey else theirs))
        return chosen[0], chosen[1]


class StudentViews:
    """Replayed views, reduced; picklable. Stands where `Views` does.

    Attributes:
        teacher: the views that the teacher sees.
        settings: of the reduction.
        digest: names the views and what becomes of them.
    """

    def __init__(self, views: Views, settings: StudentViewSettings) -> None:
        self.teacher, self.settings = views, settings
        mean, std = settings.normalization(views)
        self.digest = digest_json(
            {"views": views.digest, "size": settings.size, "grey": settings.grey, "mean": mean, "std": std}
        )

    def apply_batch(
        self, images: torch.Tensor | Sequence[torch.Tensor], *, keys: Sequence[str], view: int
    ) -> torch.Tensor | list[torch.Tensor]:
        """Returns the views of `Views.apply_batch`, reduced: uint8 [B, C, H, W], or a list of B images."""
        return self.reduce(self.teacher.apply_batch(images, keys=keys, view=view))

    def reduce(self, viewed: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Returns the teacher's views as the student sees them."""
        if isinstance(viewed, torch.Tensor) and len(viewed):
            # Channels are resized one by one, of any image.
            return self._resized(self._greyed(viewed).flatten(0, 1)).unflatten(0, (len(viewed), -1))
        return [self._resized(self._greyed(image)) for image in viewed]

    def _greyed(self, images_CHW: torch.Tensor) -> torch.Tensor:
        if images_CHW.dtype != torch.uint8 and (self.settings.grey or self.settings.size):
            raise SpecError(
                f"student.views: size and grey are for uint8 images; views.transform returns {images_CHW.dtype}; drop them, "
                "or let the transform return uint8"
            )
        if not self.settings.grey or images_CHW.shape[-3] != 3:
            return images_CHW
        return (
            torch.stack(
                [view_ops.grey_image(image) for image in images_CHW.reshape(-1, *images_CHW.shape[-3:])]
            )
            .to(torch.uint8)
            .reshape(*images_CHW.shape[:-3], 1, *images_CHW.shape[-2:])
        )

    def _resized(self, image_CHW: torch.Tensor) -> torch.Tensor:
        size = self.settings.size
        return image_CHW if size is None else view_ops.resize_shorter(image_CHW, size)
