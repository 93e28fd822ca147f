"""Looking through a cache: numbers are those of its rows, a large cache is not read whole, the server answers its page alone."""

import http.client
import json
import re
import shutil
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from softcache.data.sources import open_source
from softcache.data.sources.images.base import InMemorySource
from softcache.errors import AlignmentError, IncompleteCacheError, LabelError, SourceError
from softcache.reader.open import open_cache
from softcache.runs import open_data
from softcache.stages.cli import softcache
from softcache.tools.browse import Browser, SourceSamples, browse, make_server, overview
from tests.support.caches import ROOT, digits_config, make_cache
from tests.support.text_caches import make_text_cache

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">../../etc/passwd"


class BrokenSource(InMemorySource):
    """Digits with hostile names, of which one image has no readable bytes."""

    def image(self, sample):
        if sample == 3:
            raise SourceError(f"source hostile: {HOSTILE}: not an image")
        return super().image(sample)


def hostile_source(split):
    plain = open_source({"name": "digits", "max_train_samples": 40, "max_eval_samples": 10}, split=split)
    images = np.stack([plain.image(number).numpy() for number in range(len(plain))])
    keys = [f"{HOSTILE}{key}" for key in list(plain.keys())]
    names = [HOSTILE, *plain.class_names[1:]]
    return InMemorySource(f"hostile/{split}", torch.from_numpy(images), plain.targets(), keys, names)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("browse") / "cache", labels={"num_views": 3})[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browse-text")
    _, data, cache = make_text_cache(folder / "cache", folder)
    return data, cache


def data_of(page):
    """The JSON in a page; it is the one block of data, whatever its strings are."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_overview_has_the_numbers_of_the_rows(digits):
    found = Browser(digits).overview
    views = [digits.read(np.arange(len(digits)), view) for view in range(3)]
    targets = digits.samples_table().targets
    guesses = np.stack([labels.ids[:, 0] for labels in views])
    np.testing.assert_array_equal(found.sample_S, np.arange(300))
    np.testing.assert_array_equal(found.guess_S, guesses[0])
    np.testing.assert_allclose(found.confidence_S, np.exp(views[0].log_probs[:, 0].astype(np.float64)))
    np.testing.assert_allclose(found.doubt_S, views[0].stats[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(found.agrees_S, guesses[0] == targets)
    np.testing.assert_allclose(found.same_S, (guesses[1:] == guesses[0]).mean(0))


def test_without_statistics_the_entropy_is_a_bound_from_below(digits):
    labels = digits.read(np.arange(len(digits)), 0)
    bound = overview.row_entropies(type(labels)(**(vars(labels) | {"stats": None})))
    assert (bound <= labels.stats[:, 0] + 1e-3).all()
    kept = np.exp(labels.log_probs.astype(np.float64))
    rest = 1 - kept.sum(1)
    np.testing.assert_allclose(bound, -(kept * np.log(kept)).sum(1) - rest * np.log(rest), atol=1e-9)


def test_a_large_cache_is_looked_at_in_chunks_that_are_spread_evenly(digits, monkeypatch):
    monkeypatch.setattr(overview, "MAX_SAMPLES", 60)
    monkeypatch.setattr(overview, "MAX_CHUNKS", 4)
    cache, decoded = open_cache(digits.url), []
    decode = cache._decode_block
    monkeypatch.setattr(cache, "_decode_block", lambda key: decoded.append(key) or decode(key))
    browser = Browser(cache)
    page, _ = browser.page(served=True)
    assert len(browser.overview.sample_S) == 60
    assert sorted({block for _, block in decoded}) == [0, 3, 6, 9]
    assert "60 of 300 samples" in data_of(page)["notes"][0]
    found = browser.find(browser._keys[150])  # in no chunk that was looked at
    assert found["sample"] == [150]


def test_a_view_that_is_not_finished_is_left_out(tmp_path, digits):
    shutil.copytree(digits.url, tmp_path / "cache")
    for unit in (5, 6, 7, 8, 9):
        (tmp_path / f"cache/units/{unit:05d}.json").unlink()
    browser = Browser(open_cache(tmp_path / "cache"))
    assert [len(one["views"]) for one in browser.details([0, 299])] == [2, 2]
    for unit in range(5):
        (tmp_path / f"cache/units/{unit:05d}.json").unlink()
    with pytest.raises(IncompleteCacheError, match=r"no unit of view 0 is finished.*rerun"):
        Browser(open_cache(tmp_path / "cache"))


def test_a_token_has_the_row_that_predicts_it(texts):
    data, cache = texts
    browser = Browser(cache, SourceSamples(cache, data))
    (one,) = browser.details([2])
    tokens, stored = data.train.source.sample(2).tokens, cache.read_stored([2])
    assert "".join(text for text, _ in one["pieces"]) == data.decode_tokens(*tokens)
    rows = {row["at"]: row for _, found in one["pieces"] for row in found}
    assert sorted(rows) == (stored.positions + 1).tolist()
    for place, position in enumerate(stored.positions.tolist()):
        row, labels = rows[position + 1], stored.labels
        assert row["p"] == pytest.approx(np.exp(labels.target_log_prob[place]), abs=1e-5)
        assert row["h"] == pytest.approx(labels.stats[place, 0], abs=1e-4)
        name, p = row["top"][0]
        assert name == data.class_name(labels.ids[place, 0])
        assert p == pytest.approx(np.exp(float(labels.log_probs[place, 0])), abs=1e-5)
    (rest,) = browser.details([2], first=3)
    assert min(row["at"] for _, found in rest["pieces"] for row in found) == 3


def test_a_place_with_dots_in_it_is_read():
    place = ROOT / "tests" / ".." / "tests/golden/v1/zarr"
    np.testing.assert_array_equal(
        open_cache(place).read([0]).ids, open_cache(ROOT / "tests/golden/v1/zarr").read([0]).ids
    )


def test_texts_of_another_source_are_refused(texts, digits):
    with pytest.raises(AlignmentError, match="kind 'image', the source is of kind 'tokens'"):
        SourceSamples(digits, texts[0])


@pytest.mark.parametrize("place", sorted((ROOT / "tests/golden").glob("v1*/*/manifest.json")), ids=str)
def test_every_kind_of_cache_has_a_page(place):
    cache = open_cache(place.parent)
    if cache.manifest.codec["name"] == "vectors":
        with pytest.raises(
            LabelError, match=r"expected labels with classes; found hidden states.*softcache inspect"
        ):
            Browser(cache)
        return
    page, policy = Browser(cache).page()
    data = data_of(page)
    assert set(data["details"]) == set(map(str, data["sample"]))
    assert all(one.get("views") or one.get("pieces") for one in data["details"].values())
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert all(doubt is not None and doubt >= 0 for doubt in data["doubt"])


def test_hostile_names_are_data_and_a_broken_image_is_a_sentence(tmp_path):
    _, data, cache = make_cache(
        tmp_path / "cache",
        source={
            "name": "tests.tools.test_browse:hostile_source",
            "max_train_samples": None,
            "max_eval_samples": None,
        },
    )
    data.train.source.__class__ = BrokenSource
    page, _ = Browser(cache, SourceSamples(cache, data)).page()
    assert HOSTILE not in page
    found = data_of(page)
    assert found["key"][0].startswith(HOSTILE)
    assert found["details"]["3"]["picture"] is None
    assert found["details"]["3"]["why"].startswith("its image cannot be shown: source hostile")
    assert found["details"]["4"]["picture"].startswith("data:image/png;base64,")


@contextmanager
def served(browser):
    server, address = make_server(browser)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(address, path="", method="GET", **headers):
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
    connection.request(method, path if path.startswith("/") else url.path + path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_the_server_answers_its_own_page_and_nothing_else(digits):
    with served(Browser(digits)) as address:
        status, page, headers = ask(address)
        assert status == 200
        assert "connect-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert data_of(page)["details"] == {}
        status, text, _ = ask(address, "details?samples=7,2")
        assert [one["sample"] for one in json.loads(text)] == [7, 2]
        assert json.loads(ask(address, "find?key=DIGITS/0007")[1])["key"] == ["digits/0007"]
        assert ask(address, Host="evil.example")[0] == 403, "DNS rebinding"
        assert ask(address, Host="127.0.0.1.evil.example:80")[0] == 403
        assert ask(address, Host="localhost:1234")[0] == 200, "a forwarded port"
        for path in ("/", "/wrong/", "/wrong/details?samples=1", "../../../etc/passwd", "page.html"):
            assert ask(address, path)[0] == 404, path
        for query in ("samples=a", "samples=-1", "samples=300", "", f"samples={','.join('1' * 65)}"):
            assert ask(address, f"details?{query}")[0] == 400, query
        assert ask(address, method="POST")[0] == 501


def test_the_command_writes_one_file(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = lambda *words: CliRunner().invoke(softcache, ["browse", digits.url, *words])
    result = run("--out", "page.html", "--samples", "10")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("wrote page.html: ")
    data = data_of((tmp_path / "page.html").read_text())
    assert len(data["details"]) == 10
    doubt = np.sort(Browser(digits).overview.doubt_S)
    assert sorted(data["doubt"])[-5:] == pytest.approx(doubt[-5:], abs=1e-4), "the least certain are there"
    assert run("--out", "page.html", "--samples", "9").exit_code == 0, "a page may be written anew"
    (tmp_path / "softcache.toml.bak").write_text("[source]")
    result = run("--out", "softcache.toml.bak")
    assert "page softcache.toml.bak: there is a file that is no page, and would be lost" in str(
        result.exception
    )
    assert (tmp_path / "softcache.toml.bak").read_text() == "[source]"
    (tmp_path / "pages").mkdir()
    assert "page pages: is a folder; expected a file" in str(run("--out", "pages").exception)
    assert "--samples: is of the file" in run("--samples", "10").output


def test_a_notebook_shows_it_in_a_frame_without_rights(digits):
    shown = browse(digits, open_data(digits_config()), num_shown=4)._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in shown
    assert "<script" not in shown
