"""A cache from another program's cache of soft labels.

    base.py       what a format is: `Original`, and the registry
    formats/      one module per format
    top_rows.py   its probabilities to soft labels, and what of them is refused
    write.py      the manifest, then unit by unit
    crops.py      FKD's crops for a student
    unpickle.py   files of torch.save and pickle, without running code

The config's source defines the samples. What the original lacks is in the manifest (`attributes.imported`), and nothing is
put in its place. docs/how-to/import-caches.md is the page for users.
"""

from softcache.tools.import_caches.base import IMPORTERS, Original, open_original
from softcache.tools.import_caches.top_rows import TopRows
from softcache.tools.import_caches.write import import_cache

__all__ = ["IMPORTERS", "Original", "TopRows", "import_cache", "open_original"]
