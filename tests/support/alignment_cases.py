"""The perturbations: what is done to a world, what is expected, and what the message must name.

`REFUSED` cases must end with exit code 1 and one message before the sample or setting at fault is trained on; `HARMLESS` ones must
show the student the same samples, views and labels.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from softcache.data.sources.images.image_folder import ImageFolderSource
from softcache.data.transforms import Views
from softcache.reader.open import open_cache
from softcache.tools.convert import convert_cache
from tests.data.test_text_source import CHAT, save_tokenizer
from tests.support.alignment import Found, World


class Refused(NamedTuple):
    """A perturbation that must be refused.

    Attributes:
        kind: of the world.
        name: of the perturbation, for the table.
        named: a pattern that the message must have.
        change: applies it.
        under_way: found when the sample is read, so that others may have been trained on before.
    """

    kind: str
    name: str
    named: str
    change: Callable[[World], None]
    under_way: bool = False


REFUSED: list[Refused] = []


def refused(kind: str, name: str, named: str, *, under_way: bool = False) -> Callable:
    def add(change: Callable[[World], None]) -> Callable[[World], None]:
        REFUSED.append(Refused(kind, name, named, change, under_way))
        return change

    return add


# -- images in memory --------------------------------------------------------------------------------------


@refused("images", "dataset reversed", "sample 0 was 's000' when labeled and is 's047' now")
def _(world: World) -> None:
    world.samples = world.samples.taken(list(range(48))[::-1])


@refused("images", "two samples swapped", "sample 3 was 's003' when labeled and is 's017' now")
def _(world: World) -> None:
    order = list(range(48))
    order[3], order[17] = 17, 3
    world.samples = world.samples.taken(order)


def _pixels(world: World) -> torch.Tensor:
    world.samples = world.samples._replace(images=world.samples.images.clone())
    return world.samples.images


@refused("images", "pixels of two samples swapped, keys stay", "the contents of sample 's003' changed")
def _(world: World) -> None:
    images = _pixels(world)
    images[[3, 17]] = images[[17, 3]]


@refused("images", "one sample's pixels replaced by another image", "the contents of sample 's005' changed")
def _(world: World) -> None:
    _pixels(world)[5] = 255 - _pixels(world)[5]


@refused("images", "one pixel of one sample off by one grey level", "the contents of sample 's040' changed")
def _(world: World) -> None:
    _pixels(world)[40, 0, 4, 4] ^= 1


@refused("images", "one sample's key renamed", "sample 9 was 's009' when labeled and is 'renamed' now")
def _(world: World) -> None:
    world.samples.keys[9] = "renamed"


@refused("images", "one sample added", "48 samples were labeled, the source has 49 \\('new' is new\\)")
def _(world: World) -> None:
    more = world.samples.taken([*range(48), 0])
    more.keys[48] = "new"
    world.samples = more


@refused("images", "one sample removed", "48 samples were labeled, the source has 47 \\('s009' is gone\\)")
def _(world: World) -> None:
    world.samples = world.samples.taken([n for n in range(48) if n != 9])


@refused("images", "one sample listed twice", "'s000' comes twice")
def _(world: World) -> None:
    world.samples = world.samples.taken([*range(48), 0])


@refused(
    "images", "one sample's class changed", "sample 's004' had ground truth 4 when labeled and has 5 now"
)
def _(world: World) -> None:
    world.samples.targets[4] = 5


@refused(
    "images", "classes numbered otherwise", "sample 's000' had ground truth 0 when labeled and has 9 now"
)
def _(world: World) -> None:
    world.samples = world.samples._replace(targets=[9 - target for target in world.samples.targets])


@refused("images", "images of another size", "the contents of sample 's000' changed")
def _(world: World) -> None:
    world.samples = world.samples._replace(images=torch.nn.functional.pad(world.samples.images, (0, 1, 0, 1)))


VIEW_CHANGES = {
    "another seed of the views": ({"seed": 8}, "views.seed: 7 there, 8 here"),
    "crop moved further": ({"padding": 2}, "views.padding: 1 there, 2 here"),
    "another crop": ({"crop": "resized", "padding": 0}, "views.crop: 'padded' there, 'resized' here"),
    "no crop": ({"crop": "none"}, "views.crop: 'padded' there, 'none' here"),
    "images scaled to another size": ({"size": 12}, "views.size: None there, 12 here"),
    "flips switched off": ({"flip": 0.0}, "views.flip: 0.5 there, 0.0 here"),
    "colour jitter added": ({"color_jitter": [0.2, 0.0, 0.0, 0.0]}, "views.color_jitter: "),
    "RandAugment added": ({"augment": "randaugment"}, "views.augment: 'none' there, 'randaugment' here"),
    "erasing added": ({"erase": 0.3}, "views.erase: 0.0 there, 0.3 here"),
    "normalised by another mean": ({"mean": [0.31]}, "views.mean: [0.3] there, [0.31] here"),
    "normalised by another deviation": ({"std": [0.5]}, "views.std: [0.4] there, [0.5] here"),
}
for _name, (_change, _named) in VIEW_CHANGES.items():
    refused("images", _name, re.escape(_named))(lambda world, change=_change: world.set("views", **change))


@refused("images", "the user's own transform in place of the views", r"views\.transform: None there, 'tests")
def _(world: World) -> None:
    world.tables["views"] = {
        "transform": "tests.fakes:inverting_transform",
        "mean": [0.3],
        "std": [0.4],
    }


@refused("images", "more views than were labeled", r"reader\.num_views: 3, but cache cache holds 2")
def _(world: World) -> None:
    world.set("reader", num_views=3)


@refused(
    "images",
    "augmentation code that is off by one grey level in one view of one sample",
    "sample 's021', view 1: the teacher saw content",
    under_way=True,
)
def _(world: World) -> None:
    apply = Views.apply_batch

    def changed(self, images, *, keys, view):
        viewed = apply(self, images, keys=keys, view=view)
        if view == 1 and "s021" in keys:
            viewed[list(keys).index("s021")][0, 3, 3] ^= 1
        return viewed

    world.patch.setattr(Views, "apply_batch", changed)


# -- image files -------------------------------------------------------------------------------------------

FILE = "train/class3/013.bmp"


def _moved(world: World, there: str) -> None:
    there_path = world.folder / "images" / there
    there_path.parent.mkdir(parents=True, exist_ok=True)
    (world.folder / "images" / FILE).rename(there_path)


@refused(
    "files", "one file overwritten by another image of its size", f"sample '{FILE}', view 0: ", under_way=True
)
def _(world: World) -> None:
    path = world.folder / "images" / FILE
    Image.fromarray(255 - world.pixels(path)).save(path)


@refused(
    "files",
    "two files' contents swapped",
    f"sample '({FILE}|train/class4/014.bmp)', view 0: ",
    under_way=True,
)
def _(world: World) -> None:
    one, two = world.folder / "images" / FILE, world.folder / "images/train/class4/014.bmp"
    there, here = one.read_bytes(), two.read_bytes()
    one.write_bytes(here)
    two.write_bytes(there)


@refused(
    "files",
    "a decoder that is off by one grey level in one image",
    f"sample '{FILE}', view 0: ",
    under_way=True,
)
def _(world: World) -> None:
    decode = ImageFolderSource.image

    def other(self, sample):
        image = decode(self, sample)
        if self.key(sample) == FILE:
            image[1, 2, 2] ^= 1
        return image

    world.patch.setattr(ImageFolderSource, "image", other)


@refused(
    "files",
    "a decoder that inverts every image",
    "sample 'train/.*', view 0: the teacher saw content",
)
def _(world: World) -> None:
    decode = ImageFolderSource.image
    world.patch.setattr(ImageFolderSource, "image", lambda self, sample: 255 - decode(self, sample))


@refused("files", "one file compressed anew, other pixels", f"the contents of sample '{FILE}' changed")
def _(world: World) -> None:
    path = world.folder / "images" / FILE
    Image.fromarray(world.pixels(path) ^ 1).save(path, "JPEG")


@refused(
    "files",
    "one file compressed anew, same pixels",
    "another one than was labeled, though .*files that were written",
)
def _(world: World) -> None:
    path = world.folder / "images" / FILE
    Image.fromarray(world.pixels(path)).save(path, "PNG")


@refused(
    "files",
    "one file renamed",
    f"was '{FILE}' when labeled and is 'train/class3/zz.bmp'|was .* when labeled",
)
def _(world: World) -> None:
    _moved(world, "train/class3/zz.bmp")


@refused("files", "one file moved to another class", "sample .* was .* when labeled and is .* now")
def _(world: World) -> None:
    _moved(world, "train/class5/013.bmp")


@refused("files", "one file removed", f"the source has 47 \\('{FILE}' is gone\\)")
def _(world: World) -> None:
    (world.folder / "images" / FILE).unlink()


@refused("files", "one file added", "the source has 49 \\('train/class3/zz.bmp' is new\\)")
def _(world: World) -> None:
    shutil.copy(world.folder / "images" / FILE, world.folder / "images/train/class3/zz.bmp")


@refused("files", "one file cut short", f"image images/{FILE}: cannot be decoded")
def _(world: World) -> None:
    path = world.folder / "images" / FILE
    path.write_bytes(path.read_bytes()[:-20])


# -- text --------------------------------------------------------------------------------------------------

NAMED = r"sample \d+ was 'doc\d+@\d+' when labeled|sample 'doc\d+@\d+' had rows|of sample 'doc\d+@\d+' changed|\('doc\d+@\d+' is (gone|new)"


def _documents(change: Callable[[list[dict]], list[dict] | None]) -> Callable[[World], None]:
    def apply(world: World) -> None:
        documents = world.documents()
        world.write(change(documents) or documents)

    return apply


def _word(documents: list[dict]) -> None:
    longest = max(documents, key=lambda document: len(document["text"]))
    words = longest["text"].split()
    words[5] = "the" if words[5] != "the" else "and"
    longest["text"] = " ".join(words)


def _swap_texts(documents: list[dict]) -> None:
    documents[3]["text"], documents[4]["text"] = documents[4]["text"], documents[3]["text"]


def _split_longest(documents: list[dict]) -> None:
    longest = max(documents, key=lambda document: len(document["text"]))
    words = longest["text"].split()
    longest["text"] = " ".join(words[:20])
    documents.append({"id": "doc900", "text": " ".join(words[20:])})


def _rename(documents: list[dict]) -> None:
    documents[7]["id"] = "doc907"


def _append_space(documents: list[dict]) -> None:
    for document in documents:
        document["text"] += "\n"


for _name, _documents_change in {
    "one word of one document replaced": _word,
    "texts of two documents swapped, keys stay": _swap_texts,
    "one document split in two": _split_longest,
    "one document's key renamed": _rename,
    "one document added": lambda documents: [
        *documents,
        {"id": "doc901", "text": "one cache serves them all"},
    ],
    "one document removed": lambda documents: documents[1:],
    "a line feed at the end of every document": _append_space,
}.items():
    refused("text", _name, NAMED)(_documents(_documents_change))


for _name, _tables, _named in (
    ("documents in the file's order", {"shuffle_documents": False}, NAMED),
    ("cut into shorter samples", {"seq_len": 24}, NAMED),
    ("documents kept apart instead of packed", {"packing": "documents"}, NAMED),
    ("another share held out", {"eval_share": 0.4}, NAMED),
    ("fewer samples", {"max_train_samples": 5}, NAMED),
    (
        "attention across documents",
        {"cross_documents": True},
        "its teacher attended otherwise .*inside a document",
    ),
    (
        "another tokenizer of the same size",
        {"tokenizer": "tokenizer2"},
        "its tokens were made by another tokenizer",
    ),
):
    refused("text", _name, _named)(lambda world, tables=_tables: world.set("source", **tables))


@refused("text", "no token at the end of a document", f"{NAMED}|another tokenizer")
def _(world: World) -> None:
    path = world.folder / "tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text())
    assert config.pop("eos_token")
    path.write_text(json.dumps(config))


@refused(
    "text",
    "one token changed in the tokenised table on disk",
    r"sample 'doc\d+@\d+', view 0: the teacher saw content",
    under_way=True,
)
def _(world: World) -> None:
    # Tables are made on first use; this one is the copy of what the cache was made from.
    for path in (world.folder / "data").rglob("samples.arrow"):
        if json.loads((path.parent / "table.json").read_text())["num_samples"] > 10:
            change_a_token(path)


def change_a_token(path: Path) -> None:
    """Changes one token of an Arrow table in place: every digest in its neighbourhood stays as it is."""
    from softcache.data.sources.text.table import TokenSource

    tokens = TokenSource(path.parent, name="changed").sample(3).tokens.copy()
    content = bytearray(path.read_bytes())
    place = content.find(tokens.tobytes())
    assert place > 0
    content[place + 8 : place + 12] = np.int32(tokens[2] ^ 1).tobytes()
    path.write_bytes(bytes(content))


# -- chats -------------------------------------------------------------------------------------------------

CHAT_NAMED = r"sample 'chat\d+@\d+' had rows|of sample 'chat\d+@\d+' changed|was 'chat\d+@\d+' when|\('chat\d+@\d+' is (gone|new)"
for _name, _template in {
    "a chat template with one word more": CHAT.replace("[user] ", "[user] w5 "),
    "a chat template that ends turns otherwise": CHAT.replace(" <eos> ", " w4 "),
    "a chat template that has the role learnt too": CHAT.replace(
        "[assistant] {% generation %}", "{% generation %}[assistant] "
    ),
}.items():
    refused("chats", _name, CHAT_NAMED)(
        lambda world, template=_template: save_tokenizer(world.folder / "tokenizer", chat_template=template)
    )


@refused("chats", "one user's question changed", CHAT_NAMED)
def _(world: World) -> None:
    chats = world.documents()
    chats[2]["messages"][0]["content"] = "w9 " + chats[2]["messages"][0]["content"]
    world.write(chats)


# -- harmless ----------------------------------------------------------------------------------------------


class Harmless(NamedTuple):
    """What must not matter.

    Attributes:
        same_batches: the steps are the same, not only what an epoch has.
    """

    name: str
    change: Callable[[World], None]
    same_batches: bool = True
    kinds: tuple[str, ...] = ("images", "text")


def _set(table: str, **values: object) -> Callable[[World], None]:
    return lambda world: world.set(table, **values)


def _reverse_lines(world: World) -> None:
    world.write(world.documents()[::-1])


def _convert(world: World) -> None:
    convert_cache(open_cache("cache"), "copy", store="parquet")
    world.cache = "copy"


def _recapture(world: World) -> None:
    world.set("capture", batch_size=3, unit_samples=12, chunk_samples=6)
    world.capture("copy")
    world.cache = "copy"


HARMLESS = [
    Harmless("another batch size", _set("train", batch_size=7), same_batches=False),
    Harmless("another seed of training", _set("train", seed=5), same_batches=False),
    Harmless("gradients accumulated over 3 pieces", _set("train", accumulation_steps=3)),
    Harmless("two loader processes", _set("reader", workers=2)),
    Harmless("read by chunks, not materialized", _set("reader", memmap="never")),
    Harmless("shuffled by windows of two chunks", _set("reader", window_blocks=2), same_batches=False),
    Harmless("labeled in other batches, units and chunks", _recapture, same_batches=False),
    Harmless("contents checked on a tenth of the samples", _set("reader", fingerprint_fraction=0.1)),
    Harmless("another student", _set("student", model="mlp?width=4"), kinds=("images",)),
    Harmless("lines of the text's file in another order", _reverse_lines, kinds=("text",)),
    Harmless("the dataset in another folder", lambda world: None),
    Harmless("another store (Parquet)", _convert),
]


# -- as expected? ------------------------------------------------------------------------------------------


def is_refused(case: Refused, found: Found) -> bool:
    """Returns whether a perturbation was refused with one message that names what is at fault, and not trained on."""
    if found.code != 1 or len(found.messages) != 1 or "Traceback" in found.err:
        return False
    if not re.search(case.named, found.messages[0]):
        return False
    if not case.under_way:
        return not found.steps
    named = re.search(r"sample '(.+?)', view (\d+): the teacher saw content", found.messages[0])
    return named is not None and not any(
        key == named[1] for step in found.steps if step.view == int(named[2]) for key, _, _ in step.samples
    )


def is_harmless(case: Harmless, found: Found, untouched: Found) -> bool:
    """Returns whether the student saw the same samples, views and labels, and in the same batches where it must."""
    same = found.code == 0 and found.epochs == untouched.epochs
    return same and (found.steps == untouched.steps or not case.same_batches)
