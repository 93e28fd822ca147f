"""XXH3 of short inputs, and Philox: whole batches at once, compiled.

    runtime/jit.py   numba's compiler, and where its code is kept
    xxh3.py          hashes of keys and of what a sample holds
    philox.py        the views' random numbers

`xxhash` and `numpy.random.Philox` are called once per sample, which for small samples costs more than the hashing. Of
256 keys and images of 8x8, fingerprints took 49 microseconds here and 110 in a loop over `xxhash` (1,300 where each
frames its own head); the views' random numbers 44 and 2,500. Both are frozen bit by bit; the tests compare them with those
libraries at every length.

Importing this takes numba along, so import it where it is used.
"""

from softcache.hashing.philox import uniforms
from softcache.hashing.xxh3 import LONGEST, fingerprints, hashes, joined_names
from softcache.runtime.jit import compiled, njit_in_subprocess, njit_inline

__all__ = [
    "LONGEST",
    "compiled",
    "fingerprints",
    "hashes",
    "joined_names",
    "njit_in_subprocess",
    "njit_inline",
    "uniforms",
]
