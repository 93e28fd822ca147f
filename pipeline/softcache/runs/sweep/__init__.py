"""Many trials of one student's settings from one cache, as an Optuna study that several processes share.

A trial does what `softcache train-student` does: a sweep only chooses the settings, and where the run goes.
"""

from softcache.runs.sweep.run import Sweep, open_sweep, run_sweep

__all__ = ["Sweep", "open_sweep", "run_sweep"]
