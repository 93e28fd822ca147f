"""The report: what students of one cache learnt, what it cost and where it failed, as one page that needs no network.

load.py            finished runs, checked to be of one data set and one cache; their students rebuilt
caches.py          the caches that the runs learnt from
partners.py        which of a student's own samples is which of the teacher's
predictions.py     what teacher and students say of the same rows
metrics.py         calibration, agreement, accuracy by class and by the teacher's confidence, teacher passes
cache_metrics.py   what the cache holds: bytes, kept mass, entropy
examples.py        samples where a student follows its teacher or does not, as pictures or tokens
sections.py        all of that as figures and tables
plots.py           the figures, drawn by plotly
page.py            the page, by Jinja2
"""

from softcache.runs.report.load import Report, open_report, open_run
from softcache.runs.report.page import write_page
from softcache.runs.report.sections import build_sections

__all__ = ["Report", "build_sections", "open_report", "open_run", "write_page"]
