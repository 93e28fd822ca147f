"""The report: what students of one cache learnt, what it cost and where it failed, as one page that needs no network.

loading.py       finished runs, checked to be of one data set and one cache; their students rebuilt
caches.py        the caches that the runs learnt from
partners.py      which of a student's own samples is which of the teacher's
predictions.py   what teacher and students say of the same rows
measures.py      calibration, agreement, accuracy by class and by the teacher's confidence, teacher passes
stored.py        what the cache holds: bytes, kept mass, entropy
examples.py      samples where a student follows its teacher or does not, as pictures or tokens
panels.py        all of that as figures and tables
figures.py       the figures, drawn by plotly
page.py          the page, by Jinja2
"""

from pipeline.report.loading import Report, open_report, open_run
from pipeline.report.page import write_page
from pipeline.report.panels import build_sections

__all__ = ["Report", "build_sections", "open_report", "open_run", "write_page"]
