"""The page in a real browser: it opens without console messages and network requests, and its controls work."""

import pytest
from click.testing import CliRunner

from softcache.stages.cli import softcache
from tests.support.pages import chromium, needs_chromium, page_opener
from tests.support.report_runs import HOSTILE, inside, make_runs

pytest.importorskip("plotly")
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = make_runs(folder)
    with inside(folder):
        result = CliRunner().invoke(
            softcache, ["report", runs, "--out", "report.html"], catch_exceptions=False
        )
    assert result.exit_code == 0, result.output
    assert "wrote report.html: 4 students" in result.output
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(page_file):
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, page_file):
    with page_opener(browser) as open_page:
        yield lambda **how: open_page(page_file.as_uri(), **how)


MARKS = ".point, .trace.bars path, .heatmaplayer image, .lines path"


def test_it_opens_in_silence_and_asks_for_nothing_but_itself(opened, page_file):
    _, messages, requests = opened()
    assert messages == []
    assert requests == [page_file.as_uri()]


def test_every_figure_has_marks_a_name_and_a_table(opened):
    page, _, _ = opened()
    plots = page.locator(".plot")
    assert plots.count() >= 15
    for number in range(plots.count()):
        plot = plots.nth(number)
        assert plot.locator(MARKS).count() > 0, plot.get_attribute("id")
        assert plot.get_attribute("aria-label")
    figures = page.locator("figure")
    for number in range(figures.count()):
        assert figures.nth(number).locator("tbody tr").count() > 0
    ids = page.evaluate(
        "[...document.querySelectorAll('[id]')].map(e => e.id).filter(i => !i.startsWith('js-'))"
    )
    own = [i for i in ids if page.locator(f"main [id='{i}']").count() > 1]
    assert own == []


def test_the_filter_works_by_keyboard(opened):
    page, messages, _ = opened()
    page.locator("#filter input[value='linear (cache)']").focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('3 of 4')")
    shown = page.evaluate("document.getElementById('glance-size').data.map(t => [t.meta, t.visible])")
    assert dict(map(tuple, shown)) == {
        "linear (cache)": False,
        "linear (hard)": True,
        "mlp?width=8 (cache)": True,
        "mlp?width=8 (hard)": True,
    }
    hidden = page.locator("[data-student='linear (cache)']")
    assert hidden.count() > 3
    assert all(hidden.nth(n).get_attribute("hidden") is not None for n in range(hidden.count()))
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('4 of 4')")
    assert messages == []


def test_the_first_table_is_sorted_by_a_column_and_filtered(opened):
    page, messages, _ = opened()
    table = page.locator("table.sortable")
    values = lambda: [
        float(text.replace(",", "")) for text in table.locator("tbody tr td:nth-child(3)").all_inner_texts()
    ]
    button = table.locator("th button", has_text="parameters")
    button.click()
    assert values() == sorted(values(), reverse=True)
    button.click()
    assert values() == sorted(values())
    assert table.locator("th[aria-sort=ascending]").inner_text().startswith("parameters")
    before = table.locator("tbody tr:visible").count()
    page.locator("#filter input[value='linear (cache)']").uncheck()
    assert table.locator("tbody tr:visible").count() == before - 1
    assert messages == []


def test_a_student_taken_out_and_put_back_has_its_figures_again(opened):
    page, messages, _ = opened()
    own = page.locator("figure[data-student]").first
    box = page.locator("#filter input").nth(
        page.evaluate(
            "[...document.querySelectorAll('#filter input')].findIndex(b => b.value === "
            "document.querySelector('figure[data-student]').dataset.student)"
        )
    )
    box.uncheck()
    own.wait_for(state="hidden")
    page.locator("#theme").click()  # redraws all that is there
    box.check()
    own.wait_for(state="visible")
    own.locator(MARKS).first.wait_for(state="attached")
    assert messages == []


def test_samples_are_filtered_by_label(opened):
    page, _, _ = opened()
    choose = page.locator("#classes")
    label = choose.locator("option").nth(1).get_attribute("value")
    choose.select_option(label)
    left = page.evaluate(
        "[...document.querySelectorAll('[data-label]')].filter(e => !e.hidden).map(e => e.dataset.label)"
    )
    assert set(left) == {label}


def test_dark_and_light_follow_the_system_and_the_button(opened):
    colour = "getComputedStyle(document.body).backgroundColor"
    ink = "document.getElementById('glance-size').layout.font.color"
    light, dark = opened()[0], opened(scheme="dark")[0]
    assert light.evaluate(colour) != dark.evaluate(colour)
    assert light.evaluate(ink) != dark.evaluate(ink)
    light.locator("#theme").focus()
    light.keyboard.press("Enter")
    assert light.evaluate(colour) == dark.evaluate(colour)
    assert light.locator("#theme").get_attribute("aria-pressed") == "true"


def test_a_phone_needs_no_scrolling_sideways(opened):
    page, _, _ = opened(width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_names_are_text_and_never_markup(opened, page_file):
    page, _, _ = opened()
    assert page.title() == "Distillation report: test"
    assert HOSTILE not in page_file.read_text()
    assert (
        page.locator("#compression-class").inner_text().count("<script>")
        or page.locator("#compression-class text", has_text="<script>").count()
    )
    assert page.locator("img[src='x']").count() == 0
