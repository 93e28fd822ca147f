"""The writing half: a frozen teacher, and the capture of its labels."""

from typing import TYPE_CHECKING

from softcache.runtime.exports import lazy_exports

__all__ = ["Teacher", "TeacherSettings", "capture"]

if TYPE_CHECKING:
    from softcache.teacher import capture
    from softcache.teacher.base import Teacher, TeacherSettings

__getattr__ = lazy_exports(
    __name__,
    {
        "Teacher": "softcache.teacher.base",
        "TeacherSettings": "softcache.teacher.base",
        "capture": "softcache.teacher.capture",
    },
)
