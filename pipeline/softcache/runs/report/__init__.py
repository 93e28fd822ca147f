"""The report: what students of one cache learnt, what it cost and where it failed, as one page that needs no network.

load.py            finished runs of one data set and one cache; their rebuilt students
caches.py          the caches that the runs learnt from
predictions.py     what teacher and students say of the same rows
metrics.py         calibration, agreement, accuracy by class and confidence, teacher passes, contents of the cache
examples.py        samples where a student follows its teacher or does not, as pictures or tokens
differences.py     the settings in which runs differ
student_table.py   the table of all students, and their score over T and alpha
*_section(s).py    the sections: figures and tables
plots.py           the figures, drawn by plotly
page.py            all sections in order, and the HTML page (Jinja2)
"""

from softcache.runs.report.load import Report, open_report, open_run
from softcache.runs.report.page import build_sections, write_page

__all__ = ["Report", "build_sections", "open_report", "open_run", "write_page"]
