"""Views of images: their parameters, their pixels, and where boxes go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import xxhash

from softcache.data.transforms import boxes as view_boxes
from softcache.data.transforms import mix
from softcache.data.transforms import ops as view_ops
from softcache.data.transforms.custom import call_transform, import_factory, seeded
from softcache.data.transforms.parameters import ViewParameters, crop_of, erase_of, jitter_of, ops_of
from softcache.data.transforms.settings import ViewSettings
from softcache.errors import SpecError
from softcache.hashing.digests import digest_json

__all__ = ["Views"]

STREAM_VERSION = 1
NUM_SLOTS = 64


class Views:
    """Replayable views under one policy; picklable.

    Attributes:
        settings: the policy.
        digest: names everything that changes what a model sees: the stream, the policy, mean and std.
    """

    def __init__(self, settings: ViewSettings) -> None:
        self.settings = settings
        self.digest = digest_json({"stream": STREAM_VERSION, **settings.identity()})
        self._factory = import_factory(settings.transform) if settings.transform else None

    def __reduce__(self) -> tuple[type[Views], tuple[ViewSettings]]:
        # The user's factory need not be picklable: a loader process imports it anew.
        return Views, (self.settings,)

    def apply(self, image: torch.Tensor, *, key: str, view: int) -> torch.Tensor:
        """Returns the view of an image, before it is mixed with another.

        Args:
            image: uint8 [C, H, W].
            key: the sample's stable key.
            view: 0 for the plain view, else any positive number.

        Returns:
            uint8 [C, H', W']; what the user's own transform returns, where there is one and view > 0. It may
            share memory with `image`, which is never written to.
        """
        if view == 0:
            return self._plain(image)
        if self._factory is not None:
            return self._own(image, key, view)
        return self._draw(image, self.parameters(key, view, *image.shape[1:]), key, view)

    def apply_batch(
        self, images: torch.Tensor | Sequence[torch.Tensor], *, keys: Sequence[str], view: int
    ) -> torch.Tensor | list[torch.Tensor]:
        """Returns the same view of many images: what `apply` gives for each, the very same pixels.

        Args:
            images: uint8 [B, C, H, W], or B images of any sizes.
            keys: [B] stable keys.
            view: as in `apply`.

        Returns:
            uint8 [B, C, H', W'] where the images came as one tensor and the view does no more to them than to move,
            mirror or blank; else a list of B images. It may share memory with `images`.
        """
        if view == 0 and self.settings.size is None:
            return images if isinstance(images, torch.Tensor) else list(images)
        if view == 0 or self._factory is not None:
            return [self.apply(image, key=key, view=view) for image, key in zip(images, keys, strict=True)]
        u_BS = self._many_uniforms(keys, view)
        if isinstance(images, torch.Tensor) and self._only_moves:
            return self._move(images, u_BS)
        return [
            self._draw(image, self._parameters(u, *image.shape[1:]), key, view)
            for image, u, key in zip(images, u_BS.tolist(), keys, strict=True)
        ]

    @property
    def teacher(self) -> Views:
        """The views that the teacher sees: these."""
        return self

    def reduce(self, viewed: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Returns what is seen of the teacher's views: all of it."""
        return viewed

    def draw_mixes(
        self, keys: Sequence[str], samples: np.ndarray, view: int, num_samples: int
    ) -> mix.Mixes | None:
        """Returns how a view of samples is mixed with others; None where the view is of single images.

        Args:
            keys, samples: [B] of the samples.
            num_samples: of their split.
        """
        if view == 0 or not self.settings.mixes:
            return None
        from softcache.hashing import batched as hashes

        numbers_BS = hashes.uniforms(
            self.settings.seed, hashes.hashes(keys), view, mix.NUM_SLOTS, first_slot=mix.FIRST_SLOT
        )
        return mix.draw_mixes(self.settings, numbers_BS, samples, num_samples)

    def parameters(self, key: str, view: int, height: int, width: int) -> ViewParameters:
        """Returns what view `view` > 0 does to an image of this key and size, before it is mixed."""
        return self._parameters(self._uniforms(key, view), height, width)

    def _parameters(self, u: list[float], height: int, width: int) -> ViewParameters:
        settings = self.settings
        side = settings.sides(height, width)
        return ViewParameters(
            crop=crop_of(settings, u, (height, width), side),
            flip=u[0] < settings.flip,
            ops=ops_of(settings, u),
            jitter=jitter_of(settings, u) if any(settings.color_jitter) else None,
            erase=erase_of(settings, u, *side) if settings.erase and u[16] < settings.erase else None,
        )

    def apply_boxes(
        self, boxes_M4: np.ndarray, *, key: str, view: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the view shows boxes, float32 [M, 4], and which of them it shows enough of to keep, bool [M].

        Args:
            boxes_M4: left, top, right, bottom in pixels of the image.
            key, view: as in `apply`.
            height, width: of the image.

        Raises:
            SpecError: the view's settings move pixels in a way that rectangles do not follow (augment, transform).
        """
        settings, size, erased = self.settings, (height, width), None
        boxes_M4 = np.asarray(boxes_M4, np.float64).reshape(-1, 4)
        if view > 0 and settings.mixes:
            raise SpecError(
                "views.mixup_alpha, views.cutmix_alpha: with boxes; a mixed image shows those of two, covered or seen "
                "through; drop them"
            )
        if view > 0 and (settings.augment != "none" or settings.transform is not None):
            what = "augment" if settings.transform is None else "transform"
            raise SpecError(
                f"views.{what}: {getattr(settings, what)!r} with boxes: it may shear or turn the image, and boxes would not "
                "follow; use crop, flip, color_jitter and erase"
            )
        if view == 0 or settings.crop != "resized":
            boxes_M4, size = self._plain_boxes(boxes_M4, size)
        # What the centre crop took does not come back when a padded one moves the image: 2M boxes from here, whole and cut.
        boxes_M4 = np.concatenate([boxes_M4, view_boxes.cut(boxes_M4, size)])
        if view > 0:
            does = self.parameters(key, view, height, width)
            erased = does.erase
            if does.crop is not None:
                top, left, rows, columns = does.crop
                margin = settings.padding if settings.crop == "padded" else 0
                side = settings.sides(height, width)
                boxes_M4 = view_boxes.transform_boxes(boxes_M4, top - margin, left - margin)
                boxes_M4, size = view_boxes.scaled(boxes_M4, (rows, columns), side), side
            if does.flip:
                boxes_M4 = view_boxes.flipped(boxes_M4, size[1])
        whole_M4, left_M4 = np.split(boxes_M4, 2)
        cut_M4, kept_M = view_boxes.visible(whole_M4, left_M4, size, erased)
        return cut_M4.astype(np.float32), kept_M

    def apply_mask(self, mask_HW: torch.Tensor, *, key: str, view: int, ignored: int) -> torch.Tensor:
        """Returns what the view shows of a mask: each pixel has the class of the image's pixel in whose middle it lies.

        Args:
            mask_HW: whole numbers, one for each pixel of the image.
            key, view: as in `apply`.
            ignored: the number of pixels that show nothing of the image: padding, and what is erased.

        Raises:
            SpecError: the view's settings move pixels in a way that masks do not follow (augment, transform, mixing).
        """
        settings = self.settings
        if view == 0:
            return self._plain_mask(mask_HW, ignored)
        if settings.mixes:
            raise SpecError(
                "views.mixup_alpha, views.cutmix_alpha: with masks; a pixel of a mixed image is of two; drop them"
            )
        if settings.augment not in ("none", "three_augment") or settings.transform is not None:
            what = "augment" if settings.transform is None else "transform"
            raise SpecError(
                f"views.{what}: {getattr(settings, what)!r} with masks: it may shear or turn the image, and masks would not "
                'follow; use crop, flip, color_jitter, erase, and augment = "three_augment"'
            )
        does = self.parameters(key, view, *mask_HW.shape)
        side = settings.sides(*mask_HW.shape)
        if settings.crop != "resized":
            mask_HW = self._plain_mask(mask_HW, ignored)
        if does.crop is not None:
            if settings.crop == "padded":
                mask_HW = torch.nn.functional.pad(mask_HW, [settings.padding] * 4, value=ignored)
            top, left, height, width = does.crop
            mask_HW = view_ops.nearest(mask_HW[top : top + height, left : left + width], *side)
        if does.flip:
            mask_HW = mask_HW.flip(-1)
        if does.erase is not None:
            top, left, height, width = does.erase
            mask_HW = mask_HW.clone()
            mask_HW[top : top + height, left : left + width] = ignored
        return mask_HW.contiguous()

    def _plain_mask(self, mask_HW: torch.Tensor, ignored: int) -> torch.Tensor:
        """`_plain` for masks."""
        settings = self.settings
        if settings.size is None:
            return mask_HW
        before = mask_HW.shape[0], mask_HW.shape[1]
        after, (height, width) = settings.scaled(*before), settings.sides(*before)
        mask_HW = view_ops.nearest(mask_HW, *after)
        if settings.letterboxed:
            return torch.nn.functional.pad(
                mask_HW, [0, width - after[1], 0, height - after[0]], value=ignored
            )
        top, left = settings.center(after[0] - height), settings.center(after[1] - width)
        return mask_HW[top : top + height, left : left + width].contiguous()

    def original_boxes(self, boxes_M4: np.ndarray, *, height: int, width: int) -> np.ndarray:
        """Returns boxes of the plain view in pixels of the image that it shows all of, cut at its edges, float64 [M, 4].

        Args:
            height, width: of the image.
        """
        before, after = (height, width), self.settings.scaled(height, width)
        return view_boxes.cut(view_boxes.scaled(np.asarray(boxes_M4, np.float64), after, before), before)

    def _plain_boxes(
        self, boxes_M4: np.ndarray, before: tuple[int, int]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """`_plain` for boxes; returns them and the new (height, width)."""
        settings = self.settings
        if settings.size is None:
            return boxes_M4, before
        after, size = settings.scaled(*before), settings.sides(*before)
        if settings.letterboxed:
            return view_boxes.scaled(boxes_M4, before, after), size
        top, left = (settings.center(longer - side) for longer, side in zip(after, size, strict=True))
        boxes_M4 = view_boxes.scaled(boxes_M4, before, after)
        return view_boxes.transform_boxes(boxes_M4, top, left), size

    def _philox(self, key: str, view: int, stream: int = 0) -> np.random.Philox:
        return np.random.Philox(
            key=np.array([self.settings.seed, xxhash.xxh3_64_intdigest(key.encode())], np.uint64),
            counter=np.array([0, view, stream, 0], np.uint64),
        )

    def _raw(self, key: str, view: int) -> np.ndarray:
        return self._philox(key, view).random_raw(NUM_SLOTS)

    def _uniforms(self, key: str, view: int) -> list[float]:
        return ((self._raw(key, view) >> np.uint64(11)) * 2.0**-53).tolist()

    def _many_uniforms(self, keys: Sequence[str], view: int) -> np.ndarray:
        """The first slots of each key's stream that any op of these settings reads, float64 [B, slots]."""
        from softcache.hashing import batched as hashes

        settings = self.settings
        few = 8 if self._only_moves and not settings.erase else 24
        slots = NUM_SLOTS if settings.augment != "none" else few
        return hashes.uniforms(settings.seed, hashes.hashes(keys), view, slots)

    @property
    def _only_moves(self) -> bool:
        settings = self.settings
        scaled = settings.size is not None or settings.crop == "resized"
        is_filled = settings.erase > 0 and settings.erase_fill != "black"
        return not (scaled or is_filled or settings.augment != "none" or any(settings.color_jitter))

    def _move(self, image_BCHW: torch.Tensor, u_BS: np.ndarray) -> torch.Tensor:
        """`_draw` of every image, where it only crops with padding, mirrors and blanks."""
        from softcache.data.transforms.crop_kernel import crop_and_flip

        settings, (height, width) = self.settings, image_BCHW.shape[2:]
        flip_B, offset_B = u_BS[:, 0] < settings.flip, np.zeros(len(u_BS), np.int64)
        top_B = left_B = offset_B
        if settings.crop == "padded":
            span = 2 * settings.padding + 1
            top_B, left_B = (u_BS[:, 3] * span).astype(np.int64), (u_BS[:, 4] * span).astype(np.int64)
        padding = settings.padding if settings.crop == "padded" else 0
        images = image_BCHW.contiguous().numpy()
        out_BCHW = torch.from_numpy(crop_and_flip(images, top_B, left_B, flip_B, padding))
        for row in np.flatnonzero(u_BS[:, 16] < settings.erase).tolist() if settings.erase else ():
            top, left, rows, columns = erase_of(settings, u_BS[row].tolist(), height, width)
            out_BCHW[row, :, top : top + rows, left : left + columns] = 0
        return out_BCHW

    def _plain(self, image: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        if settings.size is None:
            return image
        before = (image.shape[1], image.shape[2])
        after, (height, width) = settings.scaled(*before), settings.sides(*before)
        image = view_ops.resize(image, *after, mode=settings.interpolation)
        if settings.letterboxed:
            return self._filled(image, height, width)
        top, left = settings.center(after[0] - height), settings.center(after[1] - width)
        return image[:, top : top + height, left : left + width].contiguous()

    def _filled(self, image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Returns an image of (height, width) with this one at its top left, and the mean elsewhere: 0 for the model."""
        grey = torch.tensor(self.settings.mean, dtype=torch.float64).mul(255).round().to(image.dtype)
        filled = grey.expand(len(image))[:, None, None].repeat(1, height, width)
        filled[:, : image.shape[1], : image.shape[2]] = image
        return filled

    def _draw(self, image: torch.Tensor, parameters: ViewParameters, key: str, view: int) -> torch.Tensor:
        image = self._place(image, parameters.crop)
        if parameters.flip:
            image = image.flip(-1)
        for name, strength in parameters.ops:
            image = view_ops.OPS[name](image, strength)
        if parameters.jitter is not None:
            brightness, contrast, saturation, hue = parameters.jitter
            image = view_ops.contrast(view_ops.brightness(image, brightness), contrast)
            image = view_ops.adjust_hue(view_ops.saturation(image, saturation), hue)
        if parameters.erase is not None:
            top, left, height, width = parameters.erase
            image = image.clone()
            image[:, top : top + height, left : left + width] = self._filling(
                (len(image), height, width), key, view
            )
        return image.contiguous()

    def _filling(self, shape: tuple[int, int, int], key: str, view: int) -> torch.Tensor | int:
        """What stands where a view is erased, uint8."""
        settings = self.settings
        if settings.erase_fill == "black":
            return 0
        mean, std = (np.reshape(values, (-1, 1, 1)) * 255.0 for values in (settings.mean, settings.std))
        level = mean
        if settings.erase_fill == "noise":
            # The sum of twelve uniform numbers of 16 bits, three of the stream each time: near enough to a normal one, and
            # the same on every machine.
            raw = self._philox(key, view, 1).random_raw(3 * math.prod(shape)).reshape(3, *shape)
            total = sum(((raw >> np.uint64(bits)) & np.uint64(0xFFFF)).sum(0) for bits in (0, 16, 32, 48))
            level = mean + std * ((total.astype(np.float64) - 12 * 32767.5) / 65536)
        return torch.from_numpy(np.rint(level).clip(0, 255).astype(np.uint8))

    def _place(self, image: torch.Tensor, crop: tuple[int, int, int, int] | None) -> torch.Tensor:
        """Crops and scales."""
        settings = self.settings
        side = settings.sides(image.shape[1], image.shape[2])
        if settings.crop != "resized":
            image = self._plain(image)
        if crop is None:
            return image
        if settings.crop == "padded":
            image = torch.nn.functional.pad(image, [settings.padding] * 4)
        top, left, height, width = crop
        cropped = image[:, top : top + height, left : left + width]
        return view_ops.resize(cropped, *side, mode=settings.interpolation)

    def _own(self, image: torch.Tensor, key: str, view: int) -> torch.Tensor:
        """The user's transform, made anew for each view so that it carries nothing over from the last one."""
        assert self._factory is not None
        with seeded(int(self._raw(key, view)[0])):
            made = call_transform(
                self._factory, image.clone(), f"views.transform {self.settings.transform!r}", key
            )
        if not isinstance(made, torch.Tensor) or made.ndim != 3:
            shape = f" of shape {tuple(made.shape)}" if isinstance(made, torch.Tensor) else ""
            raise SpecError(
                f"views.transform {self.settings.transform!r}: expected a tensor [C, H, W]; found "
                f"{type(made).__name__}{shape} for sample {key!r}; end it with v2.PILToTensor() or v2.ToImage()"
            )
        return made
