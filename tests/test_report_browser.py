"""The report page in a real browser: it draws, sorts, searches, is worked by keyboard, and can be read by everyone."""

import shutil

import pytest

pytest.importorskip("plotly", reason='the report needs: pip install ".[report]"')
pytest.importorskip("itables", reason='the report needs: pip install ".[report]"')
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by: pip install playwright")

from test_report import home, hostile  # noqa: F401  (fixtures)
from toy_runs import run

from rllr.report import __main__ as report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: chromium)")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(home, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("page") / "page.html"
    run(report.main, home, "--output", path)
    return path


@pytest.fixture
def visit(browser):
    """Open a page; whatever it logs as an error, or asks a network for, fails the test."""
    opened = []

    def visit(path, width=1300, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        faults = []
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "blob:", "data:")) else faults.append(request.url),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-page=ready]")
        opened.append((page, faults))
        return page

    yield visit
    for page, faults in opened:
        page.close()
        assert not faults


def draw_all(page):
    page.wait_for_selector("body[data-curves=ready]")
    page.evaluate("document.querySelectorAll('.plot').forEach(draw)")
    page.wait_for_function("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('svg'))")


def rows_of(page):
    return page.locator("#answer-table tbody tr").all_inner_texts()


def test_curves_are_drawn(page_file, visit):
    page = visit(page_file)
    draw_all(page)
    assert page.locator(".plot .scatterlayer .trace").count() > 20


def test_answers_are_sorted_and_searched(page_file, visit):
    page = visit(page_file)
    page.wait_for_selector("body[data-answers=ready]")
    assert len(rows_of(page)) == 10
    head = page.locator("#answer-table thead th", has_text="prompt")
    head.locator("[tabindex='0']").focus()
    page.keyboard.press("Enter")  # sorting is not for the pointer alone
    page.wait_for_selector("#answer-table thead th[aria-sort=ascending]")
    prompts = page.locator("#answer-table tbody td[data-label=prompt]").all_inner_texts()
    assert prompts == sorted(prompts) and head.get_attribute("aria-sort") == "ascending"
    word = prompts[0].split()[1]
    page.locator("input[type=search]").fill(word)
    found = page.locator("#answer-table tbody td[data-label=prompt]").all_inner_texts()
    assert found and all(word in prompt for prompt in found)
    page.locator("input[type=search]").fill("no such word")
    assert "No matching records" in rows_of(page)[0]


def test_tokens_by_keyboard(page_file, visit):
    """Arrow keys go through the tokens; the numbers shown are those of the data."""
    page = visit(page_file)
    tokens = page.locator("#token-view button")
    count = tokens.count()
    assert count > 1
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == tokens.nth(1).inner_text()
    shown = page.locator("#token-numbers").inner_text()
    logprob = page.evaluate("samples[0].tokens[1][1 + data.token_numbers.indexOf('logprob')]")
    assert str(float(f"{logprob:.4g}")) in shown.replace("−", "-")
    page.keyboard.press("End")
    assert page.locator("#token-view button[aria-pressed=true]").count() == 1
    assert tokens.nth(count - 1).get_attribute("aria-pressed") == "true"
    assert page.locator("#token-view button[tabindex='0']").count() == 1


def test_tokens_are_coloured_by_what_is_chosen(page_file, visit):
    page = visit(page_file)
    page.select_option("#token-trail", "1")

    def colours():
        return page.evaluate("[...document.querySelectorAll('#token-view button')].map((b) => b.style.backgroundColor)")

    found = {}
    for value in ("kl", "whitened_advantage", "reward", "ratio"):
        page.check(f"input[value={value}]")
        found[value] = colours()
        assert page.locator("#token-view button").first.get_attribute("aria-label").count(value.replace("_", " ")) == 1
    assert len({tuple(own) for own in found.values()}) > 2
    before = page.locator("#token-facts").inner_text()
    page.locator("#token-after").click()
    assert page.locator("#token-facts").inner_text() != before


def test_hostile_texts_stay_texts(hostile, visit):  # noqa: F811
    page = visit(hostile)
    page.wait_for_selector("body[data-answers=ready]")
    draw_all(page)
    page.locator("#token-view button").first.click()
    page.locator("#answer-table thead th").first.click()
    assert page.evaluate("window.hacked") is None
    assert "onerror=window.hacked" in page.locator("#answer-table tbody").inner_text()
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("width", [1300, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everyone_can_read_it(page_file, visit, width, scheme):
    """Axe finds no violation of the WCAG rules, contrast among them; on a phone nothing is wider than the page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    page = visit(page_file, width, scheme)
    page.wait_for_selector("body[data-answers=ready]")
    draw_all(page)
    found = axe.Axe().run(page).response["violations"]
    assert not [(rule["id"], rule["nodes"][0]["html"]) for rule in found]
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_checker_finds_faint_text(page_file, visit):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    page = visit(page_file)
    page.add_style_tag(content=":root { --quiet: #c0c0c0; }")
    assert "color-contrast" in [rule["id"] for rule in axe.Axe().run(page).response["violations"]]
