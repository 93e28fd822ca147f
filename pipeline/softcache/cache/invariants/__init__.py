"""The invariants of a cache, numbered as in docs/format.md, and those of them that a unit's rows break."""

from softcache.cache.invariants.catalog import INVARIANTS, Violation, name_invariant
from softcache.cache.invariants.unit import broken_invariants

__all__ = ["INVARIANTS", "Violation", "broken_invariants", "name_invariant"]
