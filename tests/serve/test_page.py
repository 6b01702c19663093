"""The page in a browser: what people do with it, by mouse, by touch and by keyboard."""

import base64
import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced import cli
from ijepa_enhanced.encoder import Encoder

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

Start = Callable[..., Any]
MakeImage = Callable[..., bytes]
SCREENS = {"desktop": (1280, 900, "light"), "phone": (390, 844, "dark")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def gallery(saved: Path, make_image: MakeImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gallery")
    (root / "photos").mkdir()
    for number in range(12):
        (root / "photos" / f"{number:02d}.png").write_bytes(make_image(30 + number, 60 - number, number))
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        arguments = ["--weights", str(saved), "--out", str(root / "features"), "--workers", "0"]
        assert cli.main(["embed", str(root / "photos"), *arguments]) == 0
    return root


@pytest.fixture(scope="module")
def url(start: Start, gallery: Path) -> str:
    return f"http://{start('--gallery', str(gallery / 'features')).host}/"


class Watched:
    """A tab, and all that it said or asked for elsewhere."""

    def __init__(self, browser: Any, url: str, screen: str) -> None:
        width, height, scheme = SCREENS[screen]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=screen == "phone"
        )
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, url.rpartition("/")[0]))
        self.page.goto(url)

    def _check(self, asked: str, own: str) -> None:
        if not asked.startswith((own, "data:", "blob:")):
            self.wrong.append(asked)

    def has(self, selector: str, text: str) -> None:
        """Wait for an element with this text."""
        playwright.expect(self.page.locator(selector)).to_contain_text(text, timeout=30_000)

    def slide(self, name: str, value: float) -> None:
        """Move a slider, as a person does: with many events on the way."""
        self.page.locator(f"#{name}").fill(str(value))

    def pixels(self, canvas: str) -> Any:
        """What a canvas shows, [height, width, 4]."""
        data = self.page.locator(canvas).first.evaluate("canvas => canvas.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))))


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_shows_what_the_encoder_makes_of_images(
    browser: Any, url: str, gallery: Path, encoder: Encoder, tmp_path: Path, screen: str
) -> None:
    tab = Watched(browser, url, screen)
    tab.has("#model", "pets · patches of 8 px · 192 dimensions · gallery of 12 images")
    first, second = (gallery / "photos" / f"{number:02d}.png" for number in (3, 4))
    tab.page.set_input_files("#files", [first, second])
    playwright.expect(tab.page.locator("article")).to_have_count(2, timeout=30_000)
    assert tab.page.locator("h2").all_text_contents() == ["03.png", "04.png"]

    # The aspect ratio is that of the grid, and the colors are those of the patches.
    (shown,) = encoder.feature_maps([first])
    rows, cols = shown.shape[:2]
    pixels = tab.pixels(".colors")
    assert pixels.shape[0] * cols == pixels.shape[1] * rows

    # An image of the gallery is its own nearest neighbor.
    near = tab.page.locator("article").first.locator(".neighbors li").first
    assert near.locator(".name").text_content() == "03.png"
    assert near.locator(".score").text_content() == "1.000"
    playwright.expect(near.locator("img")).to_have_js_property("naturalWidth", 57)

    # Both sliders, and the one of layers, which works only if tokens merge.
    playwright.expect(tab.page.locator("#layer")).to_be_disabled()
    tab.slide("resolution", 96)
    tab.has("#resolution-text", "96 px")
    playwright.expect(tab.page.locator("article .layers + p").first).to_contain_text("144 patches", timeout=30_000)
    tab.slide("rate", 0.2)
    playwright.expect(tab.page.locator("article .layers + p").first).to_contain_text(
        "tokens at the end", timeout=30_000
    )
    assert tab.page.locator(".count").first.text_content() == "74 tokens after layer 3"
    tab.slide("layer", 1)
    assert tab.page.locator(".count").first.text_content() == "116 tokens after layer 1"

    # A patch by mouse or finger, then others by keyboard, which stop at the edge.
    canvas = tab.page.locator(".seen").first
    box = canvas.bounding_box()
    assert box is not None
    canvas.click(position={"x": 2, "y": box["height"] - 2})
    chosen = tab.page.locator(".chosen").first
    rows, cols = encoder.feature_maps([first], resolution=96)[0].shape[:2]
    assert chosen.text_content() == f"to the patch in row {rows} of {rows}, column 1 of {cols}"
    before = tab.pixels(".similar")
    canvas.focus()
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        tab.page.keyboard.press(key)
    assert chosen.text_content() == f"to the patch in row {rows - 1} of {rows}, column 1 of {cols}"
    assert not np.array_equal(tab.pixels(".similar"), before)

    # What is no image is named and left out, the others stay.
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    tab.page.set_input_files("#files", [text, second])
    tab.has("#error", "notes.txt: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file.")
    playwright.expect(tab.page.locator("h2")).to_have_text(["04.png"], timeout=30_000)

    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.page.evaluate(overflow) <= 0
    assert tab.page.locator("[aria-busy]").count() == 0
    tab.page.screenshot(path=tmp_path / f"{screen}.png", full_page=True)
    # The only thing that the console may tell is the answer to what is no image.
    assert tab.wrong == ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]


def test_all_of_the_page_works_by_keyboard(browser: Any, url: str, gallery: Path) -> None:
    tab = Watched(browser, url, "desktop")
    tab.has("#model", "pets")
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.id") == "files"
    tab.page.set_input_files("#files", gallery / "photos" / "00.png")
    playwright.expect(tab.page.locator("article")).to_have_count(1, timeout=30_000)
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("ArrowRight")
    tab.has("#resolution-text", "56 px")
    playwright.expect(tab.page.locator("article .layers + p")).to_contain_text("50 patches", timeout=30_000)
    for _ in range(2):  # the slider of layers is off
        tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "seen"
    tab.has(".chosen", "row 3 of 5, column 6 of 10")  # the middle
    tab.page.keyboard.press("ArrowDown")
    tab.has(".chosen", "row 4 of 5, column 6 of 10")
    assert tab.wrong == []


def test_the_page_asks_for_the_token(browser: Any, start: Start, gallery: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("open-sesame")
    running = start("--token-file", str(file), "--gallery", str(gallery / "features"))
    tab = Watched(browser, f"http://{running.host}/", "phone")
    tab.has("#model", "The token is missing.")
    tab.page.fill("#token", "wrong")
    tab.page.keyboard.press("Enter")
    tab.has("#model", "The token is wrong.")
    tab.page.fill("#token", "open-sesame")
    tab.page.locator("#login button").click()
    tab.has("#model", "pets")
    assert not tab.page.locator("#login").is_visible()
    tab.page.set_input_files("#files", gallery / "photos" / "00.png")
    playwright.expect(tab.page.locator(".neighbors img").first).to_have_js_property(
        "naturalWidth", 60, timeout=30_000
    )  # pictures need the token too
    assert [text for text in tab.wrong if "401 (Unauthorized)" not in text] == []


def test_dropped_images_are_shown(browser: Any, url: str) -> None:
    tab = Watched(browser, url, "desktop")
    tab.has("#model", "pets")
    file = io.BytesIO()
    Image.new("RGB", (64, 24), "red").save(file, "PNG")
    tab.page.evaluate(
        """numbers => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(numbers)], "red.png", {type: "image/png"}));
          document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        [*file.getvalue()],
    )
    playwright.expect(tab.page.locator("h2")).to_have_text(["red.png"], timeout=30_000)
    height, width = tab.pixels(".seen").shape[:2]
    assert width / height == pytest.approx(64 / 24, abs=0.35)  # a whole number of patches
    assert tab.wrong == []


def test_the_description_of_the_interface_is_shown(browser: Any, url: str) -> None:
    tab = Watched(browser, f"{url}docs", "desktop")
    tab.has("#operations", "POST /v1/embeddings/files")
    tab.has("#operations", "list of file")
    schema = json.loads(tab.page.evaluate("fetch('/openapi.json').then(answer => answer.text())"))
    assert len(schema["paths"]) == tab.page.locator(".operation").count() == 6
    assert tab.wrong == []
