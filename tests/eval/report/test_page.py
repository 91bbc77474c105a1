"""The page in a real browser, at a phone's and a desk's width: nothing is fetched, wrong or too wide."""

import shutil

import pytest

from tests.support.reporting import PROMPTS_ASKED
from tests.support.system import missing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_in_a_browser(shapes_report, width):
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        missing("no Chromium; apt-get install chromium")
    page_file = shapes_report / "report.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        asked = [url for url in asked if not url.startswith("data:")]
        assert said == [] and asked == [page_file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert page.evaluate("document.images.length") == PROMPTS_ASKED and page.evaluate(broken) == 0
        widest = "Math.max(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().right))"
        assert 0 < page.evaluate(widest) <= width
        assert page.evaluate("document.querySelectorAll('svg text').length") > 20  # text that can be read and searched
        browser.close()
    assert page_file.stat().st_size < 3e6


def test_a_training_by_rewards_is_drawn_with_the_weights_that_were_exported():
    from eval.report.figures import rounds

    looks = [{"step": s, "score": 0.5 + s / 100, "vendi": 1 - s / 200, "layouts": 0.9} for s in (10, 20, 30)]
    svg = rounds(looks, 20)
    assert svg.count("<svg ") == 1 and all(f">{step}<" in svg for step in (10, 20, 30)) and "layouts" in svg
    assert rounds(looks, None) != svg
