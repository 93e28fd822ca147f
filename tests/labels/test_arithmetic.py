"""The tables of docs/scale.md are those that the formulas give, and the formulas are right where one can check by hand."""

import doctest

from click.testing import CliRunner

from benchmarks import arithmetic, scheduling
from tests.support.caches import ROOT, make_cache
from tests.support.text_caches import make_text_cache


def test_the_page_has_the_tables_that_the_formulas_give(tmp_path):
    page = tmp_path / "scale.md"
    page.write_text((ROOT / "docs/scale.md").read_text())
    assert CliRunner().invoke(arithmetic.main, ["--write", str(page)]).exit_code == 0
    assert page.read_text() == (ROOT / "docs/scale.md").read_text(), (
        "python -m benchmarks.arithmetic --write docs/scale.md"
    )
    for table in arithmetic.tables().values():
        assert table in page.read_text()


def test_the_formulas_examples_hold():
    for module in (arithmetic, scheduling):
        failed, tried = doctest.testmod(module)
        assert failed == 0
        assert tried > 0


def test_the_objects_of_a_unit_are_those_that_a_store_writes(tmp_path):
    """Of the packed codec in Zarr: what the arithmetic multiplies with."""
    image = make_cache(tmp_path / "image", capture={"codec": "packed"}, labels={"num_views": 1})[2]
    text = make_text_cache(tmp_path / "text", tmp_path, capture={"codec": "packed"})[2]
    for cache, case in ((image, arithmetic.IMAGES), (text, arithmetic.TEXT)):
        assert {len(marker.shards) for marker in cache.markers.values()} == {case.shards}
