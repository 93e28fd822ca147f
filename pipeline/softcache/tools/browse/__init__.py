"""A cache looked through: samples with their image or text, what the teacher gives them, and how sure it is.

samples.py   images, texts and names, from the source that the cache was made of
overview.py  which samples are looked at, and a few numbers of each
details.py   everything of one sample
browser.py   the three together, as JSON
server.py    the page on 127.0.0.1, which asks for samples as they are shown
page.html, page.js   the page, as one file with the samples in it or with a server behind it
"""

from softcache.tools.browse.browser import Browser, browse
from softcache.tools.browse.samples import SourceSamples
from softcache.tools.browse.server import make_server

__all__ = ["Browser", "SourceSamples", "browse", "make_server"]
