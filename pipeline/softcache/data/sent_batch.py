"""How a loader process sends a batch: a small one through the pipe, a large one in one file of shared memory.

torch gives each tensor, however small, a file of shared memory of its own, whose descriptor is asked for over a socket, and
copies all that lies between the first and the last number of a tensor: of labels that are columns of one table, the whole
table for each column. Here numbers are copied once, out of their tables, to places of one file; those of a small batch are
pickled with what is around them, and so are those of any batch where /dev/shm has no room (containers have 64 MB by
default), or where the process may open no more files (`ulimit -n`): an error there would be one of a thread of torch's that
drops the batch, for which the reader then waits for ever.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from softcache.errors import StorageError
from softcache.runtime.logging import log_info

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

__all__ = ["SentBatch", "loader_batches"]


_LARGEST = 2**19
"""Bytes of tensors above which a batch goes through shared memory."""
_is_reported = False
_ALIGNMENT = 64
_UNUSABLE = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT)


class SentBatch:
    """A base of batches: in a loader process they are pickled so, elsewhere as any object."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        from torch.utils.data import get_worker_info

        if get_worker_info() is None:
            return super().__reduce_ex__(protocol)
        tensors = [x for x in _tensors(vars(self)) if _is_copied(x)]
        memory = None if sum(x.nbytes for x in tensors) <= _LARGEST else _shared_memory(tensors)
        if memory is None:
            return _received, (_Object(type(self), _exchanged(vars(self), _is_copied, _array_of)),)
        return _received, (
            _Object(type(self), _exchanged(vars(self), _is_copied, memory.put)),
            *memory.sent,
        )


class _Object(NamedTuple):
    """An object of softcache's and its attributes."""

    kind: type
    attributes: dict[str, Any]


class _Array(NamedTuple):
    """A tensor's numbers; of bfloat16, which NumPy lacks, their bits."""

    values: Any
    dtype: torch.dtype

    def tensor(self, memory: torch.Tensor | None) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.values).view(self.dtype)


class _Place(NamedTuple):
    """Where in shared memory a tensor's numbers are."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size

    def tensor(self, memory: torch.Tensor | None) -> torch.Tensor:
        assert memory is not None
        return memory[self.start : self.stop].view(self.dtype).reshape(self.shape)


class _SharedMemory:
    """Memory for the numbers of some tensors that another process will have without a copy.

    Attributes:
        bytes: [n] uint8.
        sent: the function that opens the memory in another process, and its arguments; made here, because it takes a file
            descriptor, which there may not be.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        import torch
        from torch.multiprocessing.reductions import reduce_storage

        num_bytes = sum(-(-x.nbytes // _ALIGNMENT) * _ALIGNMENT for x in tensors)
        # As torch's own collation does, whose batches lie in shared memory from the start.
        storage = torch.UntypedStorage._new_shared(num_bytes)
        self.bytes, self.sent = _bytes_of(storage), reduce_storage(storage)
        self._end = 0

    def put(self, value: torch.Tensor) -> _Place:
        place = _Place(self._end, self._end + value.nbytes, value.dtype, value.shape)
        place.tensor(self.bytes).copy_(value)
        self._end = -(-place.stop // _ALIGNMENT) * _ALIGNMENT
        return place


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _is_copied(value: torch.Tensor) -> bool:
    """Whether a tensor's numbers are sent, and not its own shared memory or what another class makes of it."""
    import torch

    is_plain = type(value) is torch.Tensor and value.layout == torch.strided and not value.requires_grad
    return is_plain and value.device.type == "cpu" and not value.is_shared()


def _array_of(value: torch.Tensor) -> _Array:
    import torch

    bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
    return _Array(bits.numpy(), value.dtype)


def _shared_memory(tensors: list[torch.Tensor]) -> _SharedMemory | None:
    """Returns memory for the tensors; None where there is no room for it."""
    try:
        return _SharedMemory(tensors)
    except (OSError, RuntimeError) as error:
        global _is_reported
        if not _is_reported:
            log_info(
                f"/dev/shm: {error}; batches go through pipes, which is slower: make it larger, as by --shm-size, or let "
                "a process open more files, by ulimit -n"
            )
        _is_reported = True
        return None


def loader_batches(loader: DataLoader[Any], setting: str) -> Iterator[Any]:
    """Yields the batches of a DataLoader.

    Args:
        setting: of the number of its processes, for the error.

    Raises:
        StorageError: its processes cannot start, or go on, for lack of shared memory or file descriptors; those of the
            dataset as they are.
    """
    try:
        yield from loader
    except EOFError as error:
        if error.args:  # not of a connection between processes
            raise
        raise StorageError(
            "a loader process hung up while it shared memory, as one that may open no more files does; raise `ulimit -n` "
            f"or set {setting} = 0"
        ) from error
    except (OSError, RuntimeError) as error:
        # multiprocessing's semaphores are files there, too; their error names none.
        is_of_semaphores = isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename is None
        if isinstance(error, StorageError) or not (is_of_semaphores or "shared memory" in str(error)):
            raise
        raise StorageError(
            f"/dev/shm: no place for what loader processes share: {str(error).strip().splitlines()[-1]}; make it larger "
            f"(docker run --shm-size=2g; a memory volume in Kubernetes), free what others have there, or set {setting} = 0"
        ) from error


def _is_own(value: Any) -> bool:
    """Whether a value is an object that may have tensors among its attributes, such as labels."""
    return (
        is_dataclass(value) and type(value).__module__.startswith("softcache.") and hasattr(value, "__dict__")
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in a value, in the order in which `_exchanged` comes to them."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
    elif _is_own(value):
        yield from _tensors(vars(value))


def _exchanged(
    value: Any, chosen: Callable[[torch.Tensor], bool], stand_in: Callable[[torch.Tensor], Any]
) -> Any:
    """Returns a value with a stand-in in the place of each of its chosen tensors."""
    import torch

    if isinstance(value, torch.Tensor):
        return stand_in(value) if chosen(value) else value
    if isinstance(value, dict):
        return {name: _exchanged(one, chosen, stand_in) for name, one in value.items()}
    if isinstance(value, list):
        return [_exchanged(one, chosen, stand_in) for one in value]
    if _is_own(value):
        return _Object(type(value), _exchanged(vars(value), chosen, stand_in))
    return value


def _received(value: Any, opened: Callable[..., Any] | None = None, arguments: Sequence[Any] = ()) -> Any:
    """Returns what `_exchanged` was given."""
    return _restored(value, None if opened is None else _bytes_of(opened(*arguments)))


def _restored(value: Any, memory: torch.Tensor | None) -> Any:
    if isinstance(value, _Array | _Place):
        return value.tensor(memory)
    if isinstance(value, _Object):
        out: Any = object.__new__(value.kind)
        vars(out).update(_restored(value.attributes, memory))
        return out
    if isinstance(value, dict):
        return {name: _restored(one, memory) for name, one in value.items()}
    return [_restored(one, memory) for one in value] if isinstance(value, list) else value
