"""How large an object may be: more than what it is can be is refused before there is room made for it."""

from softcache.errors import CorruptionError

__all__ = ["size_error"]


def size_error(where: str, found: int, max_bytes: int) -> CorruptionError:
    """Returns the error of an object that is larger than what it is can be."""
    return CorruptionError(
        f"{where}: {found:,} bytes; at most {max_bytes:,} are expected there; restore it from a copy"
    )
