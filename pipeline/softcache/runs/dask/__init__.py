"""Capture on many workers: a Dask cluster of this machine's processes, or one that is there.

`cluster` starts or joins the cluster, `worker` runs on a worker, `scheduler` hands out units and counts outcomes, `capture`
combines them. Only `cluster` and `capture` use Dask, and import it when they are called.
"""

from softcache.runs.dask.capture import capture_on_dask

__all__ = ["capture_on_dask"]
