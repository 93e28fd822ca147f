"""Reinforced datasets of Apple (github.com/apple/ml-dr): a file for each image, by its number.

    rdata/0.pth.tar … N-1.pth.tar    (number, [{"params": …, "prob": ([p, …], [id, …])}, …]), a dict for each view
    rdata/config.pth.tar             the run's settings

Files are of torch.save or, with `joblib`, pickles compressed by zlib; both hold builtin containers and numbers.
Probabilities are the teacher's (an ensemble's mean) over all classes at T = 1, K of them in no order. `params` has what was
drawn: crop, flip, RandAugment, erasing, mixup or CutMix with the other image's number. Images are numbered as torchvision's
dataset has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from softcache.data.batch import Dataset
from softcache.errors import SourceError
from softcache.labels import LabelKind
from softcache.tools.import_caches.base import IMPORTERS, Original, digest_files
from softcache.tools.import_caches.join import SampleKeys
from softcache.tools.import_caches.top_rows import TopRows, from_probabilities
from softcache.tools.import_caches.unpickle import load_file

__all__ = ["MlDr"]

SUFFIX, CONFIG = ".pth.tar", "config.pth.tar"


class _Views(NamedTuple):
    """The views of some images.

    Attributes:
        samples: [B] which images.
        params: [B][C] how each view was made.
        ids: [B, C, K] int32.
        probs: [B, C, K] float64.
    """

    samples: np.ndarray
    params: list[list[Any]]
    ids: np.ndarray
    probs: np.ndarray


@IMPORTERS.register("ml-dr")
class MlDr(Original):
    """The folder of the files."""

    kind: ClassVar[LabelKind] = "image"
    by_view: ClassVar[bool] = False

    def __init__(self, paths: Sequence[Path], data: Dataset) -> None:
        self._num_classes = int(data.source.num_classes)
        self.num_views = self.k = 0  # until the first file was read
        files = {file.name.removesuffix(SUFFIX): file for path in paths for file in path.glob(f"*{SUFFIX}")}
        config = files.pop(CONFIG.removesuffix(SUFFIX), None)
        if not files:
            raise SourceError(
                f"ml-dr, {', '.join(map(str, paths))}: no file NUMBER{SUFFIX}; expected one for each image"
            )
        keys = SampleKeys(data.source, "ml-dr", by_number=True)
        samples = keys.samples(list(files), of=str(paths[0]))
        self._paths = np.empty(len(data), object)
        self._paths[samples] = list(files.values())
        keys.check_all(self._paths != None, of=str(paths[0]))  # noqa: E711
        self.digest = digest_files((file.name, file) for file in self._paths)
        first = self._load(0)
        self.num_views, self.k = len(first), len(first[0]["prob"][1])
        settings = load_file(config, of="ml-dr", plain=True) if config is not None else {}
        found = settings.get("reinforce", {}) if isinstance(settings, dict) else {}
        self.facts = {"joined_by": keys.joined_by, "image_augmentation": found.get("image_augmentation")}
        self._held: _Views | None = None

    def read(self, samples: np.ndarray, view: int, batch: Any) -> TopRows:
        views = self._views(samples)
        return from_probabilities(views.ids[:, view], views.probs[:, view], self._num_classes)

    def parameters(self, samples: np.ndarray, view: int) -> dict[str, Any]:
        """Returns `params`, [B] of the files' own lists or dicts."""
        return {"params": [of_image[view] for of_image in self._views(samples).params]}

    def where(self, sample: int, view: int) -> str:
        return str(self._paths[sample])

    def _views(self, samples: np.ndarray) -> _Views:
        """Returns what the files of some images hold; the last ones are kept, for their other views."""
        if self._held is None or not np.array_equal(self._held.samples, samples):
            self._held = None
            shape = len(samples), self.num_views, self.k
            held = _Views(samples, [], np.empty(shape, np.int32), np.empty(shape))
            for row, sample in enumerate(samples.tolist()):
                views = self._load(sample)
                held.params.append([view["params"] for view in views])
                held.probs[row], held.ids[row] = (
                    np.array([view["prob"][part] for view in views], np.float64) for part in (0, 1)
                )
            self._held = held
        return self._held

    def _load(self, sample: int) -> list[dict[str, Any]]:
        """Returns the views of an image.

        Raises:
            SourceError: the file is damaged, of another image, or of other numbers of views or classes than the first.
        """
        path = self._paths[sample]
        found = load_file(path, of="ml-dr", plain=True)
        try:
            number, views = found
            sizes = {(len(view["prob"][0]), len(view["prob"][1]), "params" in view) for view in views}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SourceError(
                f"ml-dr, {path}: is not (number, list of params and prob of K probabilities and ids); restore it"
            ) from error
        if str(number) != path.name.removesuffix(SUFFIX):
            raise SourceError(f"ml-dr, {path}: holds image {number!r}; expected that of its name; restore it")
        k = self.k or next(iter(sizes), (0,))[0]
        num_views = self.num_views or len(views)
        if sizes != {(k, k, True)} or len(views) != num_views or not num_views:
            raise SourceError(
                f"ml-dr, {path}: {len(views)} views of {sorted(sizes)} probabilities and ids; expected {num_views} of {k}, "
                "as in the first file; leave out, or restore, what is of another run"
            )
        return list(views)
