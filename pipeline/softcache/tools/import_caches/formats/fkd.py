"""FKD's and FerKD's soft labels (github.com/szq0214/FKD): a file of torch.save for each image.

    [coords, flips, labels]       NumPy arrays
        coords  [C, 4] float      top, left, height and width of each crop, as shares of the image's height and width
        flips   [C] bool          whether the crop was mirrored after it was scaled
        labels  [C, 2, K] float   ids, and softmax's probabilities over all classes ([C, 2] of K = 1)

Files are called CLASS/NAME.tar after the image, and joined by that. With `--use_fp16` all are float16: ids beyond 2,048 are
then rounded, and crops to 1/2048 of the image. `--temp` divides logits before the softmax and is not in the files: what is
imported is taken to be at its default, T = 1. Crops are scaled by the teacher's size and interpolation, which are not there
either. Labels of type "hard" have no probability and are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from softcache.data.batch import Dataset
from softcache.errors import LabelError, SourceError
from softcache.labels import LabelKind
from softcache.tools.import_caches.base import IMPORTERS, UNKNOWN, Original, digest_files
from softcache.tools.import_caches.join import SampleKeys
from softcache.tools.import_caches.top_rows import TopRows, from_probabilities
from softcache.tools.import_caches.unpickle import load_file

__all__ = ["FKD"]

MOST_IN_FLOAT16 = 2048
"""Whole numbers beyond are rounded in float16."""


class _Crops(NamedTuple):
    """Crops of some images.

    Attributes:
        samples: [B] which images.
        boxes: [B, C, 4].
        flips: [B, C] bool.
        ids: [B, C, K] int32.
        probs: [B, C, K] float32.
    """

    samples: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    ids: np.ndarray
    probs: np.ndarray


@IMPORTERS.register("fkd")
class FKD(Original):
    """The folder that has the class folders, at any depth."""

    kind: ClassVar[LabelKind] = "image"
    by_view: ClassVar[bool] = False
    missing: ClassVar[tuple[str, ...]] = (
        *UNKNOWN,
        "the temperature of the softmax, taken to be 1",
        "size and interpolation of the crops",
    )

    def __init__(self, paths: Sequence[Path], data: Dataset) -> None:
        self._num_classes = int(data.source.num_classes)
        self.num_views = self.k = 0  # until the first file was read
        files = [
            (str(file.relative_to(path)), file) for path in paths for file in sorted(path.rglob("*.tar"))
        ]
        if not files:
            raise SourceError(
                f"fkd, {', '.join(map(str, paths))}: no file NAME.tar below; expected one for each image"
            )
        keys = SampleKeys(data.source, "fkd")
        names = Counter(file.name.split(".")[0] for _, file in files)
        of_class = max(names.values()) > 1
        samples = keys.samples(
            [
                f"{file.parent.name}/{file.name.split('.')[0]}" if of_class else file.name.split(".")[0]
                for _, file in files
            ],
            of=str(paths[0]),
        )
        self._paths = np.empty(len(data), object)
        self._paths[samples] = [file for _, file in files]
        keys.check_all(self._paths != None, of=str(paths[0]))  # noqa: E711
        self.digest = digest_files(files)
        self.num_views, _, self.k = self._load(0)[2].shape
        self.facts = {"joined_by": keys.joined_by}
        self._held: _Crops | None = None

    def read(self, samples: np.ndarray, view: int, batch: Any) -> TopRows:
        crops = self._crops(samples)
        return from_probabilities(crops.ids[:, view], crops.probs[:, view], self._num_classes)

    def parameters(self, samples: np.ndarray, view: int) -> dict[str, Any]:
        """Returns `box`, [B, 4] float32, as in the files, and `flip`, [B] bool."""
        crops = self._crops(samples)
        return {"box": crops.boxes[:, view], "flip": crops.flips[:, view]}

    def where(self, sample: int, view: int) -> str:
        return str(self._paths[sample])

    def _crops(self, samples: np.ndarray) -> _Crops:
        """Returns what the files of some images hold; the last ones are kept, for their other views."""
        if self._held is None or not np.array_equal(self._held.samples, samples):
            self._held = None
            shape = len(samples), self.num_views
            held = _Crops(
                samples,
                np.empty((*shape, 4), np.float32),
                np.empty(shape, bool),
                np.empty((*shape, self.k), np.int32),
                np.empty((*shape, self.k), np.float32),
            )
            for row, sample in enumerate(samples.tolist()):
                held.boxes[row], held.flips[row], labels = self._load(sample)
                held.ids[row], held.probs[row] = labels[:, 0], labels[:, 1]
            self._held = held
        return self._held

    def _load(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns boxes [C, 4], flips [C] and labels [C, 2, K] of an image.

        Raises:
            SourceError: the file is damaged, or of other shapes than the first.
            LabelError: its ids are no classes, or of no probability.
        """
        path = self._paths[sample]
        found = load_file(path, of="fkd")
        arrays = [np.asarray(part) for part in found] if isinstance(found, list | tuple) else []
        if len(arrays) == 3 and arrays[2].ndim == 1:
            raise LabelError(
                f'fkd, {path}: labels of type "hard", which have no probability; expected ids and probabilities'
            )
        if len(arrays) == 3 and arrays[2].ndim == 2:
            arrays[2] = arrays[2][:, :, None]
        num_views = self.num_views or (len(arrays[0]) if arrays else 0)
        shapes = [array.shape for array in arrays]
        num_slots = self.k or (shapes[2][-1] if len(shapes) == 3 and shapes[2] else 0)
        wanted = [(num_views, 4), (num_views,), (num_views, 2, num_slots)]
        if shapes != wanted or not num_slots or arrays[2].dtype.kind != "f":
            raise SourceError(
                f"fkd, {path}: {', '.join(map(str, shapes)) or type(found).__name__}; expected coordinates, flips and "
                f"labels of {', '.join(map(str, wanted))}, as in the first file; leave out what is of another run"
            )
        ids = arrays[2][:, 0].astype(np.float64)
        if arrays[2].dtype == np.float16 and self._num_classes > MOST_IN_FLOAT16:
            raise LabelError(
                f"fkd, {path}: ids in float16, which rounds those above {MOST_IN_FLOAT16:,}; source has "
                f"{self._num_classes:,}; generate them without --use_fp16"
            )
        for crop, slot in np.argwhere(ids != np.rint(ids))[:1].tolist():
            raise LabelError(
                f"fkd, {path}: crop {crop} has the id {ids[crop, slot]:g} in slot {slot}; expected a whole number"
            )
        return arrays[0], arrays[1].astype(bool), arrays[2]
