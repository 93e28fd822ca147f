"""What others prove a writer of caches, or a storage backend, with.

    from softcache.testing import validate

    assert validate("runs/mine/cache") == []              # a line for each fault, by the invariants of docs/format.md

    from softcache.testing.storage import StorageContract  # imports pytest

    class TestMyStorage(StorageContract):
        @pytest.fixture
        def reopen(self):
            return lambda: MyObjects("/somewhere/empty")

`FaultyObjects` is a store that refuses, loses answers, repeats writes and ends its process, by a seed or at a given
operation; `fault_proxy` does the same to connections, and `simulation` is a storage in memory whose clients are led step by
step. Nothing here imports pytest but `storage` and `format`.
"""

from softcache.testing.faults import FaultyObjects, Killed
from softcache.testing.validate import schema, validate, vectors

__all__ = ["FaultyObjects", "Killed", "schema", "validate", "vectors"]
