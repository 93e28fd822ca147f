"""Tiles of sixteen photos, a class each: a small classification of real pixels, made from files inside of two packages.

    pip install scikit-image
    python -m benchmarks.photo_tiles runs/photos

Of each photo (14 of scikit-image, 2 of scikit-learn, scaled to a shorter side of 384 pixels) every tile of 64x64 belongs to
one split: of each four, one is held out. `runs/photos/few/train` has six tiles of each class, 96 in all,
`runs/photos/all/train` all of them for a teacher; both have the same tiles for evaluation.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

NAMES = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
    "rocket.jpg",
)
SHORTER, SIDE, FEW = 384, 64, 6


def photos() -> dict[str, Image.Image]:
    """Returns the photos by name."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    found = {Path(name).stem: Image.open(folder / name).convert("RGB") for name in NAMES}
    two = load_sample_images()
    names = [Path(name).stem for name in two.filenames]
    return found | {name: Image.fromarray(image) for name, image in zip(names, two.images, strict=True)}


def tiles(photo: Image.Image) -> list[Image.Image]:
    """Returns the tiles of a photo, in an order that is drawn once and for all."""
    scale = SHORTER / min(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
    places = [
        (x, y)
        for y in range(0, photo.height - SIDE + 1, SIDE)
        for x in range(0, photo.width - SIDE + 1, SIDE)
    ]
    order = np.random.default_rng(0).permutation(len(places))
    return [photo.crop((x, y, x + SIDE, y + SIDE)) for x, y in (places[number] for number in order)]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Writes the tiles as PNG files into OUT."""
    for name, photo in photos().items():
        made = tiles(photo)
        held_out, rest = made[::4], [tile for number, tile in enumerate(made) if number % 4]
        for root, train in (("all", rest), ("few", rest[:FEW])):
            for split, chosen in (("train", train), ("eval", held_out)):
                folder = out / root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for number, tile in enumerate(chosen):
                    tile.save(folder / f"{number:03d}.png")


if __name__ == "__main__":
    main()
