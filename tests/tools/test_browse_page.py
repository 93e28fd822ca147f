"""The page of a cache in a real browser: served and as one file, with hostile names, by mouse and by keyboard."""

import re

import pytest

from softcache.tools.browse import Browser, SourceSamples, browse
from tests.support.caches import make_cache
from tests.support.pages import chromium, needs_chromium, page_opener
from tests.support.text_caches import make_text_cache
from tests.tools.test_browse import HOSTILE, served

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = needs_chromium
ORDER = "[...document.querySelectorAll('#cards h3')].map(one => one.textContent)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The browser of a cache with hostile names, and the files of a text's page and of a notebook."""
    folder = tmp_path_factory.mktemp("browse-page")
    hostile = {
        "name": "tests.tools.test_browse:hostile_source",
        "max_train_samples": None,
        "max_eval_samples": None,
    }
    _, data, cache = make_cache(folder / "cache", source=hostile)
    _, texts, of_texts = make_text_cache(folder / "texts", folder)
    (folder / "text.html").write_text(Browser(of_texts, SourceSamples(of_texts, texts)).page()[0])
    frame = browse(cache, data, num_shown=5)._repr_html_()
    (folder / "notebook.html").write_text(f"<html data-drawn=yes><body>{frame}</body></html>")
    return Browser(cache, SourceSamples(cache, data)), folder


@pytest.fixture(scope="module")
def opened(pages):
    with chromium() as browser, page_opener(browser) as open_page:
        yield open_page


def test_the_served_page_sorts_filters_and_pages(opened, pages):
    with served(pages[0]) as address:
        page, messages, requests = opened(address)
        found = pages[0].overview
        keys, doubt = pages[0]._keys, dict(zip(found.sample_S.tolist(), found.doubt_S, strict=True))
        by_doubt = sorted(doubt, key=lambda sample: (-round(float(doubt[sample]), 4), sample))
        assert page.evaluate(ORDER) == [keys[sample] for sample in by_doubt[:24]]
        assert page.locator("#cards img").count() == 24
        page.locator("#next").click()
        expect(page.locator("#status")).to_have_text("25 to 40 of 40")
        assert page.evaluate(ORDER) == [keys[sample] for sample in by_doubt[24:]]
        page.locator("#class").fill("7")
        sevens = int(((found.guess_S == 7) | (found.target_S == 7)).sum())
        expect(page.locator("#status")).to_have_text(f"1 to {sevens} of {sevens}")
        page.locator("#class").fill("")
        page.locator("#show").select_option("teacher differs from the ground truth")
        wrong = int((found.agrees_S == 0).sum())
        assert wrong > 0
        expect(page.locator("#status")).to_have_text(re.compile(f"of {wrong}$"))
        # The page is light or dark as the system is, and as its button has it.
        colour = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(colour)
        page.locator("#theme").click()
        assert page.evaluate(colour) != light
        assert page.locator("#theme").get_attribute("aria-pressed") == "true"
        assert messages == []
        assert all(url.startswith((address, "data:image/")) for url in requests), requests


def test_hostile_names_are_shown_as_text(opened, pages):
    with served(pages[0]) as address:
        page, messages, _ = opened(address, width=390, scheme="dark")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("#cards h3").first.inner_text().startswith(HOSTILE)
        assert page.locator("#cards img[src='x']").count() == 0
        assert page.title().startswith("Cache ")
        assert page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
        )
        assert page.evaluate("window.ran") is None
        assert all("Content Security Policy" in message for message in messages)


def test_a_token_shows_what_the_teacher_would_have_written(opened, pages):
    page, messages, requests = opened((pages[1] / "text.html").as_uri(), width=390)
    box, tokens = page.locator("#alternatives"), page.locator("#cards .tokens").first
    assert not box.is_visible()
    tokens.locator("[data-row]").nth(1).hover()
    assert "the teacher gives it" in box.inner_text()
    assert box.locator("tr").count() >= 5
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.className") != "tokens":
        page.keyboard.press("Tab")
    first = box.inner_text()
    page.keyboard.press("ArrowRight")
    assert box.inner_text() != first
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.keyboard.press("Escape")
    assert not box.is_visible()
    colours = "[...document.querySelectorAll('[data-row]')].map(one => one.style.background)"
    by_entropy = page.evaluate(colours)
    page.locator("#shade").select_option("p")
    assert page.evaluate(colours) != by_entropy
    assert len(set(by_entropy)) > 3
    assert messages == []
    assert requests == [(pages[1] / "text.html").as_uri()]


def test_a_notebook_draws_it_in_its_frame(opened, pages):
    page, messages, _ = opened((pages[1] / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#cards li").first.wait_for()
    assert frame.locator("#cards > li").count() == 5
    assert messages == []
