"""The labels of a teacher into a cache: planned (`plan_manifest`), labeled, written (`capture`)."""

from typing import TYPE_CHECKING

from softcache.runtime.exports import lazy_exports

__all__ = ["CaptureReport", "CaptureSettings", "capture", "plan_manifest"]

if TYPE_CHECKING:
    from softcache.teacher.capture.plan import CaptureSettings, plan_manifest
    from softcache.teacher.capture.run import CaptureReport, capture

__getattr__ = lazy_exports(
    __name__,
    {
        "CaptureReport": "softcache.teacher.capture.run",
        "CaptureSettings": "softcache.teacher.capture.plan",
        "capture": "softcache.teacher.capture.run",
        "plan_manifest": "softcache.teacher.capture.plan",
    },
)
