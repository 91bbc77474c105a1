"""The page in a real browser: drawing, downloading, cancelling, two people, mistakes; nothing from elsewhere."""

import io
import json
import re
import shutil
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from sd_mini import png
from sd_mini.app.server import serving
from sd_mini.cli import commands as cli
from sd_mini.cli.opening import open_pipeline
from sd_mini.pipelines.generation import fingerprint
from tests.app.support import add_checkpoints, unfinished
from tests.eval.report.test_page import CHROMIUM
from tests.support.editing import HALF, picture
from tests.support.system import missing

WIDTHS = (390, 1280)
SERIOUS = ("serious", "critical")
PROMPT = "a small red circle, größer als ein 赤い丸"
BRUSH = (255, 0, 255)
TRIES = 5
TABS = ("Pictures", "Side by side", "Report", "Model card", "Loss curves")


@pytest.fixture(scope="module")
def run_folder(tiny_run, shapes_report, tmp_path_factory):
    """A trained run with a report, a model card, checkpoints and a log."""
    folder = tmp_path_factory.mktemp("app") / "my run"
    shutil.copytree(shapes_report.parent / "run", folder)
    shutil.copytree(shapes_report, folder / "report")
    add_checkpoints(folder, open_pipeline(folder), {10: 0.5, 20: 1.0})
    log = folder / "noise_predictor" / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 30)))
    return folder


@pytest.fixture(scope="module")
def unfinished_folder(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "young"
    shutil.copytree(tiny_run, folder)
    return unfinished(folder)


@pytest.fixture(scope="module")
def address(run_folder, unfinished_folder):
    with serving([run_folder, unfinished_folder], open_pipeline, "127.0.0.1", 0) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        missing("no Chromium; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Open the page in a browser of its own, which may ask nobody but the page's own server."""

    @contextmanager
    def visit(width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        context.set_default_timeout(15_000)
        page, asked, errors = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Generate").wait_for()
        yield page
        own = urlsplit(address).netloc
        foreign = {url for url in asked if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != own}
        assert foreign == set() and errors == []
        context.close()

    return visit


def fill(page, **fields):
    for name, value in fields.items():
        label = {"Width": "Width, px"}.get(name, name.replace("_", " "))
        page.get_by_label(label, exact=True).first.fill(str(value))


def draw(page):
    page.evaluate("document.querySelectorAll('.status').forEach(line => line.textContent = '')")  # of an earlier one
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("status").filter(has_text="Done").first.wait_for()


def download(page, folder):
    """The selected picture's file."""
    with page.expect_download() as event:
        page.get_by_role("button", name="Download PNG").first.click()
    event.value.save_as(folder / event.value.suggested_filename)
    return folder / event.value.suggested_filename


def assert_settings(page, line):
    """The selected picture's settings hold the line, soon."""
    text = page.get_by_label("Settings of the selected picture").first.element_handle()
    page.wait_for_function("([text, line]) => text.value.split('\\n').includes(line)", arg=[text, line])


def assert_message(page, *parts):
    """One message, one line, with all `parts` in it; then away with it."""
    toast = page.locator(".toast-body.error")
    toast.wait_for()
    text = toast.inner_text()
    for part in parts:
        assert part in text, text
    assert "Traceback" not in text and len(text) < 400
    toast.get_by_test_id("toast-close").click()
    toast.wait_for(state="detached")


def test_a_picture_and_its_file(visit, run_folder, tmp_path):
    with visit() as page:
        fill(page, Prompt=PROMPT, Negative_prompt="a blue cross", Seed=5)
        draw(page)
        assert page.get_by_alt_text("The picture").count() == 1
        file = download(page, tmp_path)
    settings = png.read(file)
    assert (settings.prompt, settings.negative_prompt, settings.seed) == (PROMPT, "a blue cross", 5)
    assert settings.num_inference_steps == 2 and settings.guidance_scale == 2.0 and settings.width == 32
    assert file.name.startswith("a-small-red-circle-größer") and file.name.endswith("-5.png")
    assert cli.main(["generate", str(run_folder), "--like", str(file), "--out", str(tmp_path / "again.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(Image.open(file)))


def test_every_tab_fits_and_can_be_used_by_all(visit):
    """At both widths: no sideways scroll, and nothing serious that axe-core finds."""
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()
    with visit() as page:
        fill(page, Prompt="a small red circle", Count=3)
        draw(page)
        page.get_by_role("button", name="Start from a picture").click()
        page.get_by_role("button", name="Start from this picture").click()
        for tab in TABS:
            page.get_by_role("tab", name=tab).click()
            if tab == "Side by side":
                page.get_by_role("button", name="Draw the grid").click()
                page.get_by_role("status").filter(has_text="Done").last.wait_for()
            if tab == "Report":
                page.frame_locator("iframe[title=Report]").get_by_role("heading").first.wait_for()
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                page.wait_for_timeout(300)  # for what moves and fades
                assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
                found = axe.run(page).response["violations"]
                serious = {one["id"]: [n["html"] for n in one["nodes"]] for one in found if one["impact"] in SERIOUS}
                assert serious == {}, (tab, width)


def test_html_is_text(visit):
    with visit() as page:
        prompt = '<img src=x onerror="window.done = 1"><b>bold</b> **strong** [link](http://example.invalid)'
        fill(page, Prompt=prompt)
        draw(page)
        assert_settings(page, f"prompt: {prompt}")
        fill(page, Prompt=prompt, Width=33)
        page.get_by_role("button", name="Generate").click()
        assert_message(page, "33", "multiple of")
        assert page.evaluate("window.done") is None


def test_cancel_and_draw_again(visit):
    with visit() as page:
        fill(page, Prompt="a circle", Count=64)
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("status").filter(has_text="Drawing").first.wait_for()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("status").filter(has_text="Cancelled").first.wait_for()
        assert page.locator(".gallery button.thumbnail-item").count() < 64
        fill(page, Count=1)
        draw(page)


def test_two_people_and_one_who_leaves(visit):
    with visit() as one, visit() as other:
        fill(one, Prompt="a circle", Count=64)
        one.get_by_role("button", name="Generate").click()
        # begun: a step's line may be too short to be seen between two pictures'
        one.get_by_role("status").filter(has_text=re.compile("Drawing|of 64 drawn")).first.wait_for()
        fill(other, Prompt="a square")
        draw(other)
        assert "Done" not in one.get_by_role("status").first.inner_text()  # who asks for one waits for one
        one.goto("about:blank")
        draw(other)


def test_mistakes_are_messages(visit, tmp_path):
    with visit() as page:
        page.get_by_role("button", name="Generate").click()
        assert_message(page, "prompt is empty")
        fill(page, Prompt="x" * 2**20)
        page.get_by_role("button", name="Generate").click()
        assert_message(page, "prompt", "at most")
        fill(page, Prompt="a circle", Width=33)
        page.get_by_role("button", name="Generate").click()
        assert_message(page, "width 33", "multiple of")
        forged = tmp_path / "forged.png"
        chunks = png_chunks(json.dumps({"prompt": "a circle", "seed": "<b>"}))
        picture().save(forged, pnginfo=chunks)
        for file, parts in ((forged, ("forged.png", "seed")), (large(tmp_path), ("large.png",))):
            page.locator("input[type=file]").last.set_input_files(file)
            assert_message(page, *parts)


def png_chunks(text):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt(png.SETTINGS, text)
    return chunks


def large(folder):
    """A PNG of 50 MB without settings."""
    path = folder / "large.png"
    picture().save(path)
    path.write_bytes(path.read_bytes() + bytes(50_000_000))
    return path


def test_settings_are_used_again(visit, tmp_path):
    with visit() as page:
        fill(page, Prompt="the first", Seed=11)
        draw(page)
        fill(page, Prompt="the second", Seed=12)
        draw(page)
        page.locator(".gallery button.thumbnail-item").nth(1).click()  # the newest is first
        assert_settings(page, "seed: 11")
        page.get_by_role("button", name="Random seed").click()
        page.wait_for_function("document.querySelector('input[aria-label=Seed]').value != '11'")
        page.get_by_role("button", name="Use these settings").first.click()
        page.wait_for_function("document.querySelector('input[aria-label=Seed]').value == '11'")
        assert page.get_by_label("Prompt", exact=True).input_value() == "the first"


def edit(page, file):
    """The picture in the editor, its brush ready."""
    from playwright.sync_api import TimeoutError

    page.get_by_role("button", name="Brush", exact=True).wait_for()  # the toolbar comes up after the canvas
    for _ in range(TRIES):
        page.locator("input[type=file]").first.set_input_files(file)
        try:  # the editor takes up the brush, and shows its size, as the last step of taking in a picture
            return page.get_by_role("button", name="Brush Size").wait_for(timeout=10_000)
        except TimeoutError:  # on a busy machine it drops a file that arrives while it clears its new canvas
            continue
    raise AssertionError(f"the editor took none of {TRIES} uploads")


def paint(page):
    """A stroke from the middle of the editor's canvas, seen on it."""
    canvas = page.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 10, steps=5)
    page.mouse.up()
    page.mouse.move(box["x"], box["y"])  # the brush's outline away from the stroke
    inside = {"x": x + 15, "y": y + 5, "width": 1, "height": 1}
    for _ in range(TRIES * 10):
        pixel = Image.open(io.BytesIO(page.screenshot(clip=inside))).convert("RGB").getpixel((0, 0))
        if pixel == BRUSH:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"the stroke has the colour {pixel}, expected {BRUSH}")


def test_from_a_picture_of_which_a_part_is_painted_over(visit, run_folder, tmp_path):
    picture().save(tmp_path / "a.png")
    HALF.resize((16, 16)).save(tmp_path / "small.png")
    with visit() as page:
        fill(page, Prompt="a circle")
        page.get_by_role("button", name="Start from a picture").click()
        edit(page, tmp_path / "a.png")
        draw(page)
        similar = download(page, tmp_path / "similar")
        assert png.read(similar).image == fingerprint(Image.open(tmp_path / "a.png"))
        assert png.read(similar).strength == 0.8

        paint(page)
        draw(page)
        repainted = png.read(download(page, tmp_path))
        assert repainted.image == png.read(similar).image and repainted.mask_image is not None

        page.locator("input[type=file]").nth(-2).set_input_files(tmp_path / "small.png")
        page.locator("img[src$='/small.png']").wait_for()  # uploaded
        page.get_by_role("button", name="Generate").click()
        assert_message(page, "mask_image 0 is 16 x 16")
    out = tmp_path / "again.png"
    argv = ["generate", run_folder, "--like", similar, "--image", tmp_path / "a.png", "--out", out]
    assert cli.main([str(word) for word in argv]) == 0
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(similar)))


def test_a_run_that_is_not_finished(visit):
    with visit() as page:
        page.get_by_label("Run", exact=True).click()
        page.get_by_role("option", name="young").click()
        page.get_by_role("tab", name="Loss curves").click()
        page.get_by_text("in training, step 20").wait_for()
        fill(page, Prompt="a circle")
        page.get_by_role("button", name="Generate").click()
        assert_message(page, "noise_predictor")


def test_a_grid_over_checkpoints(visit):
    with visit() as page:
        fill(page, Prompt="a circle")
        page.get_by_role("tab", name="Side by side").click()
        page.get_by_label("checkpoints").check()
        page.get_by_role("button", name="Draw the grid").click()
        page.get_by_text("step 20, seed 0").wait_for()
        assert page.get_by_text("step 10, seed 0").count() == 1
