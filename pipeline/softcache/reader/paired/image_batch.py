"""A batch on its way from a loader process: the same samples as the teacher and as the student sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["PairedBatch"]


class PairedBatch(NamedTuple):
    """The teacher's side is compared with what the cache says of it; the student's is what is trained on."""

    teacher: Any
    student: Any

    def pin_memory(self) -> PairedBatch:
        return PairedBatch(self.teacher, self.student.pin_memory())
