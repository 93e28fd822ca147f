"""Capture on many workers: a Dask cluster of this machine's processes, or one that is there.

`cluster` starts or joins the cluster, `worker` is what runs on a worker, `scheduling` hands units out and counts what comes
back, `capturing` is the whole. Only `cluster` and `capturing` know Dask, and import it when they are called.
"""

from softcache.runs.dask.capture import capture_on_dask

__all__ = ["capture_on_dask"]
