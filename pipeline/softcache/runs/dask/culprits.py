"""Which sample it is that a unit fails on, where the error does not say so: by halves, from the first batch that fails."""

from __future__ import annotations

from softcache.teacher.capture.run import CaptureContext

__all__ = ["bisect_failing_sample"]


def bisect_failing_sample(work: CaptureContext, number: int) -> str:
    """Returns "sample KEY, view V: " of the first sample that fails by itself, or "" where none does.

    Costs at most one more pass of the teacher over the unit.
    """
    unit, size = work.manifest.plan.unit(number), work.settings.batch_size
    for start in range(unit.start, unit.stop, size):
        stop = min(start + size, unit.stop)
        if not _fails(work, unit.view, start, stop):
            continue
        while stop - start > 1:
            middle = (start + stop) // 2
            if _fails(work, unit.view, start, middle):
                stop = middle
            else:
                start = middle
        if _fails(work, unit.view, start, stop):
            return f"sample {work.data.source.key(start)!r}, view {unit.view}: "
        return ""
    return ""


def _fails(work: CaptureContext, view: int, start: int, stop: int) -> bool:
    try:
        batch = work.data.load(range(start, stop), view)
        _, faults_P = work.teacher.label(batch, work.labels)
        return bool(faults_P.any())
    except Exception:
        return True
