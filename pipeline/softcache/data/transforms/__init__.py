"""Augmentation as a pure function of (seed, sample key, view): first parameters, then pixels.

The student replays the very pixels that the teacher saw, and the cache stores no byte for it. View 0 is the
plain evaluation view. Views from 1 on draw their parameters from a counter-based generator:

    raw = numpy.random.Philox(key=[seed, xxh3_64(key utf-8)], counter=[0, view, 0, 0]).random_raw(64)
    u[i] = (raw[i] >> 11) * 2**-53            # uniform in [0, 1)

Every op owns fixed slots of `u`, listed below, so that switching one op on or off, or adding one later,
changes no other. NumPy documents Philox's raw output as stable.

    0 flip                      1, 2 crop area and aspect          3, 4 crop top and left
    8..13 colour jitter: brightness, contrast, saturation, hue, two spare
    16..21 erase: chance, area, aspect, top, left, spare
    24..63 RandAugment or TrivialAugment: (which, strength, sign, spare) per op, at most ten ops
           AutoAugment: which pair, then (sign, chance) of its ops at 26, 27 and 30, 31; three-augment: (which, strength)
    64..71 mixing with another sample's view: `mix.py`

The ops of `view_ops` are applied to uint8 [C, H, W] in the order crop, flip, augment, jitter (brightness,
contrast, saturation, hue), erase. Measured on one core: parameters 10 to 14 microseconds, padded crop and
flip of 1x28x28 with its parameters 20 (1 in a batch), all ops from 3x375x500 to 3x224x224 about 3 milliseconds.

    settings.py     the table [views]
    parameters.py   numbers into what is done to an image
    apply.py        pixels and boxes
    mix.py          mixup and CutMix of two samples' views
    custom.py       the user's own transform
"""

from softcache.data.transforms.apply import Views
from softcache.data.transforms.parameters import ViewParameters
from softcache.data.transforms.settings import Floats, ViewSettings

__all__ = ["Floats", "ViewParameters", "ViewSettings", "Views"]
