"""HTML pages: their content, escaping of names, and behavior in a browser."""

import base64
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import make_record
from PIL import Image

from visualization import heatmaps, html_pages
from visualization.heatmaps import Style
from visualization.image_record import ImageRecord

BLOCKS, STYLE = 8, Style(8, size=32)
CLASSES = ["tabby cat", "espresso", "zebra", "class 10", "class 9"]
HOSTILE = [
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>.jpg",
    "\"'`><svg onload=alert(3)>",
    "{{7*7}} {% raw %} ${7*7} <!-- <script>",
    "two\nlines\tand a tab\u2028\u0000\x1b 斑馬 🦓 شجرة",
    "&lt;b&gt; &amp; \\u003c \\",
    "lone \udcff surrogate",
]
NAN = float("nan")


def record(index: int, **changes) -> ImageRecord:
    """Return a distinct image for each index, with random patch depths. Every third prediction is wrong."""
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    values = {"target": index % 5, "prediction": (index + (index % 3 == 0)) % 5, "name": f"val/{index:04d}.jpg"}
    values |= {"confidence": float(rng.uniform(0.2, 1)), "macs": float(rng.uniform(2e8, 9e8)), "static_macs": 1e9}
    values["pixels"] = np.asarray(coarse.resize((32, 32), Image.Resampling.BICUBIC))
    values["depth"] = rng.integers(1, BLOCKS + 1, (4, 4))
    return make_record(index, **values | changes)


SOME = [record(index) for index in range(20)]


def gallery(folder: Path, records=SOME, classes=CLASSES, title="A gallery") -> Path:
    html_pages.write_gallery(folder, title, records, classes, STYLE)
    return folder / "index.html"


PNG = base64.b64decode(html_pages.embedded(np.full((40, 60, 3), 200, np.uint8)).partition(",")[2])
FACTS = [("images", "10,000")]


def summary(folder: Path, title="A summary", charts=(("Depths", "Half are 3.", PNG),), facts=FACTS, **kwargs) -> Path:
    return html_pages.write_summary(folder, title, facts, charts, **kwargs)


class Page(HTMLParser):
    """A parsed page: source, tags, and all attributes as (name, value)."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.tags, self.attributes = path.read_text(), [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]

    def images(self) -> list[dict]:
        text = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)[1]
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))["images"]


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)


# Content ------------------------------------------------------------------------------------------


def test_gallery_contains_the_records(tmp_path):
    one, other = record(3), record(4, target=-1, confidence=NAN, pixels=np.full((96, 128, 3), 77, np.uint8))
    first, second = Page(gallery(tmp_path, [one, other])).images()
    assert (first["depth"], first["columns"]) == (one.depth.ravel().tolist(), 4)
    assert np.array_equal(pixels_of(first["image"]), one.pixels)
    assert dict(first["figures"]) == {
        "class": "class 10",
        "prediction": "✗ wrong: class 9",
        "confidence": f"{one.confidence:.1%}",
        "mean depth": f"{one.mean_depth:.2f} of 8",
        "depth spread": f"{one.depth_spread:.2f}",
        "MACs": f"{one.macs / 1e6:.0f}M",
        "MACs saved": f"{1 - one.macs / 1e9:.0%}",
        "file": "val/0003.jpg",
    }
    assert (second["class"], second["verdict"], second["confidence"]) == (None, "predicted", None)
    assert second["image"].startswith("data:image/jpeg")


def test_gallery_without_labels_or_images_omits_controls(tmp_path):
    for records, known in (([record(0, target=-1)], False), ([record(0, target=-1), record(1)], True)):
        page = Page(gallery(tmp_path, records))
        assert ("wrong" in page.values("id")) is ("class_rank" in page.values("value")) is known
    page = Page(gallery(tmp_path, []))
    assert "<h2>No images</h2>" in page.source
    assert "search" not in page.values("id")


def test_summary_contains_facts_and_charts(tmp_path):
    charts = [("Depths", "Half are 3.", PNG), ("Tokens", "A third.", b"png")]
    page = Page(summary(tmp_path, charts=charts, has_gallery=True))
    assert page.values("alt") == ["Half are 3.", "A third."]
    assert [base64.b64decode(uri.partition(",")[2]) for uri in page.values("src")] == [PNG, b"png"]
    assert re.search(r"images.*10,000.*Depths.*Half are 3\..*Tokens", page.source, re.DOTALL)
    assert "index.html" in page.values("href")
    assert "a" not in Page(summary(tmp_path)).tags


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_escaped(tmp_path, name):
    page = Page(gallery(tmp_path, [record(0, name=name)], [name] * 5, title=name))
    assert page.tags == Page(gallery(tmp_path, [record(0)])).tags
    entry = page.images()[0]
    assert {entry["title"], entry["class"], entry["verdict"], *entry["words"]} == {name}
    page = Page(summary(tmp_path, title=name, charts=[(name, name, PNG)], facts=[(name, name)]))
    assert page.tags == Page(summary(tmp_path)).tags
    assert page.values("alt") == [name.replace("\udcff", "?")]


def test_pages_use_no_network(tmp_path):
    for page in (Page(gallery(tmp_path)), Page(summary(tmp_path))):
        addresses = page.values("src", "href", "srcset", "action", "poster", "data", "xlink:href")
        assert addresses
        assert all(address.startswith("data:image/") for address in addresses)
        assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", page.source)
        assert any(policy.startswith("default-src 'none'") for policy in page.values("content"))


# In a browser -------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium."""

    def __init__(self, driver):
        self.driver, self.run = driver, driver.execute_script

    def open(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        preference = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})
        self.driver.get(path.as_uri())

    def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 10, 0.02).until(lambda _: self.run(f"return {condition}"), condition)

    def drawn(self) -> None:
        self.until("near.size > 0 && [...near.values()].every(Boolean)")
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def press(self, *keys: str) -> None:
        """Press keys, given as letters or names of selenium's Keys."""
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key, key)).perform()

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def choose(self, selector: str, value: object) -> None:
        script = "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        script += "for (const type of ['input', 'change']) e.dispatchEvent(new Event(type, {bubbles: true}))"
        self.run(script, selector, value)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def order(self) -> list[int]:
        """Return the indices of the images shown."""
        return self.run("return [...document.querySelectorAll('#grid > li')].map((card) => card.item.index)")

    def focused(self) -> int | str:
        """Return the index of the focused image, or the id or class of another focused element."""
        return self.run("const e = document.activeElement; return e.parentNode.item?.index ?? (e.id || e.className)")

    def pixels(self, selector: str) -> np.ndarray:
        """Return the pixels of a canvas: [H, W, 3] int."""
        self.drawn()
        return pixels_of(self.run("return document.querySelector(arguments[0]).toDataURL()", selector))


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver")
    options, driver_program = webdriver.ChromeOptions(), shutil.which("chromedriver")
    options.binary_location = shutil.which("chromium") or ""
    if not options.binary_location or not driver_program:
        pytest.skip("needs chromium and chromedriver")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(chromium):
    """A browser whose console must be empty after each test."""
    yield chromium
    assert chromium.driver.get_log("browser") == []


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return gallery(tmp_path_factory.mktemp("gallery"))


def test_search_and_filter_select_matching_images(browser, page):
    browser.open(page)
    browser.press("/", *"ZEBRA")
    expected = [one.index for one in SOME if 2 in {one.target, one.prediction}]
    assert browser.order() == expected
    assert browser.texts("#count") == [f"{len(expected)} of 20 images"]
    browser.choose("#search", "0013.jpg")
    assert browser.order() == [13]
    browser.choose("#search", "nowhere")
    browser.click("#clear")
    assert len(browser.order()) == 20
    browser.click(".check")
    assert browser.order() == [one.index for one in SOME if one.is_wrong] == [0, 3, 6, 9, 12, 15, 18]


def test_sort_in_both_directions_puts_unknown_values_last(browser, tmp_path):
    some = [*SOME, record(20, confidence=NAN, target=-1)]
    browser.open(gallery(tmp_path, [some[i] for i in np.random.default_rng(0).permutation(21)]))
    ranks = ["class 9", "class 10", "espresso", "tabby cat", "zebra"]
    sorts = {
        "class_rank": lambda one: None if one.target < 0 else ranks.index(CLASSES[one.target]),
        "mean_depth": lambda one: one.mean_depth,
        "confidence": lambda one: None if one.confidence is NAN else one.confidence,
    }
    for value, key in sorts.items():
        known = [one for one in some if key(one) is not None]
        unknown = [one.index for one in some if key(one) is None]
        browser.choose("#sort", value)
        for sign in (1, -1):
            expected = [one.index for one in sorted(known, key=lambda one: sign * key(one))]
            assert browser.order() == expected + unknown, (value, sign)
            browser.click("#direction")


def test_canvases_equal_pillow_images(browser, page):
    one, card = SOME[1], "#grid li:nth-child(2) canvas"
    browser.open(page)
    for block in (1, 3, BLOCKS):
        browser.choose("#blocks input", block)
        assert np.abs(browser.pixels(card) - np.asarray(heatmaps.in_block(one, block, STYLE))).max() <= 2
    depth_map = heatmaps.heat_map(one.depth, (32, 32), STYLE)
    expected = {"depth": depth_map, "overlay": heatmaps.overlay(one, STYLE), "image": one.pixels}
    for view, picture in expected.items():
        browser.click(f".views label:has([value={view}])")
        assert np.abs(browser.pixels(card) - np.asarray(picture)).max() <= 2, view


def test_slider_and_play_set_the_block(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(html_pages, "FRAME_SECONDS", 0.01)
    browser.open(gallery(tmp_path))
    browser.click(".views label:has([value=depth])")
    browser.press("]", "]", "[")
    assert browser.run("return document.querySelector('[value=live]').checked"), (
        "moving the slider selects the live view"
    )
    assert browser.texts("#blocks output") == [f"block 5: {np.mean([one.depth >= 5 for one in SOME]):.0%} live"]
    browser.choose("#search", "0007")
    assert browser.texts("#blocks output") == [f"block 5: {np.mean(SOME[7].depth >= 5):.0%} live"]
    browser.click("#blocks .play")
    browser.until(f"block === {BLOCKS}")
    browser.until("block < 4")  # it loops
    browser.press("p")
    at = browser.run("return block")
    browser.driver.execute_async_script("setTimeout(arguments[0], 100)")
    assert browser.run("return block") == at


def test_enlarged_image_shows_details_and_neighbors(browser, page):
    browser.open(page)
    browser.choose("#search", "zebra")
    shown = browser.order()
    browser.run("document.querySelector('#grid li:nth-child(2) button').focus()")
    browser.press("ENTER", "ARROW_UP", "ARROW_UP", "ARROW_DOWN")
    one = SOME[shown[1]]
    live = np.asarray(heatmaps.in_block(one, 5, STYLE))
    assert np.abs(browser.pixels("#one canvas[data-view=live]") - live).max() <= 2
    assert browser.texts("#one output") == [f"block 5: {heatmaps.live_share(one, 5):.0%} live"]
    assert browser.texts("#one-figures dd") == [value for _, value in Page(page).images()[one.index]["figures"]]
    browser.press("ARROW_RIGHT")
    assert np.array_equal(browser.pixels("#one canvas[data-view=image]"), SOME[shown[2]].pixels)
    for _ in range(3):
        browser.click("#previous")
    assert browser.texts("#one-place") == [f"{len(shown)} of {len(shown)}"], "it wraps around"
    browser.click("#next")
    browser.press("ESCAPE")
    browser.until("opened === null && !document.querySelector('#one').open")
    assert browser.focused() == shown[0], "the focus returns to the card of the last image"
    for selector in ("#close", "#one"):  # a click on the backdrop hits the dialog
        browser.click("#grid li button")
        browser.run("document.querySelector(arguments[0]).click()", selector)
        browser.until("opened === null")


def test_keyboard_reaches_controls_and_cards(browser, page):
    browser.open(page)
    reached = [browser.press("TAB") or browser.focused() for _ in range(10)]
    assert [*reached[:6], reached[9]] == ["ask", "theme", "search", "sort", "direction", "wrong", 0]
    assert browser.run("return getComputedStyle(document.activeElement).outlineWidth") == "3px"
    columns = browser.run("return getComputedStyle(grid).gridTemplateColumns.split(' ').length")
    moves = {"ARROW_RIGHT": 1, "ARROW_DOWN": columns + 1, "ARROW_LEFT": columns, "ARROW_UP": 0, "END": 19, "HOME": 0}
    for key, place in moves.items():
        browser.press(key)
        assert browser.focused() == place
    browser.press("?")
    assert browser.run("return document.querySelector('#help').open")
    browser.press("ESCAPE")
    browser.until("!document.querySelector('#help').open")


def test_theme_follows_the_system_until_switched(browser, page):
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    halted = np.kron(SOME[0].depth < 4, np.ones((8, 8), bool))
    browser.open(page, scheme="dark")
    dark, drawn = browser.run(ground), browser.pixels("#grid canvas")
    assert drawn[halted].max() < 100 < heatmaps.HALTED, "halted patches are not dark on a dark page"
    assert np.array_equal(drawn[~halted], SOME[0].pixels[~halted])
    browser.open(page)
    light = browser.run(ground)
    browser.click("#theme")
    is_dark = f"getComputedStyle(document.documentElement).backgroundColor === '{dark}'"
    browser.until(is_dark)
    browser.driver.refresh()
    browser.until(is_dark)  # the choice is stored
    browser.click("#theme")
    assert browser.run(ground) == light
    browser.run("localStorage.clear()")


@pytest.mark.parametrize("width", [1280, 320])
def test_long_names_do_not_overflow_the_window(browser, tmp_path, width):
    long = "Kakatoe_galerita" * 12
    browser.open(gallery(tmp_path, [record(i, name=long) for i in range(6)], [long] * 5, title=long), width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    browser.click("#grid li button")
    assert browser.run("return one.scrollWidth - one.clientWidth") <= 0
    browser.open(summary(tmp_path, title=long, charts=[(long, long, PNG)] * 3, has_gallery=True), width)
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_hostile_names_do_not_execute_in_a_browser(browser, tmp_path):
    names = HOSTILE[:-1]  # JSON cannot carry a lone surrogate
    some = [record(i, name=name, target=i, prediction=i) for i, name in enumerate(names)]
    browser.open(gallery(tmp_path, some, names))
    assert browser.texts("#grid .name") == names
    for place, name in enumerate(names):
        browser.run("enlarge(items[arguments[0]])", place)
        assert browser.texts("#one-name, #one-figures div:last-child dd") == [name, name]
    browser.open(summary(tmp_path, title=HOSTILE[0], charts=[(HOSTILE[1], HOSTILE[2], PNG)]))
    assert browser.texts("h1, h2, figcaption p") == HOSTILE[:3]


def test_only_canvases_near_the_viewport_are_drawn(browser, tmp_path):
    browser.open(gallery(tmp_path, [record(i) for i in range(200)]), width=800)
    browser.drawn()
    drawn = "return items.filter((item) => item.card.querySelector('canvas').width > 0).map((item) => item.place)"
    first = browser.run(drawn)
    browser.run("scrollTo(0, document.documentElement.scrollHeight)")
    browser.until("near.has(items[199].card) && !near.has(items[0].card)")
    browser.drawn()
    last = browser.run(drawn)
    assert (first[0], last[-1]) == (0, 199)
    assert all(4 <= len(places) < 60 for places in (first, last))
    assert not set(first) & set(last), "images outside the window are still drawn"


@pytest.mark.slow
def test_thousand_images_respond_within_seconds(browser, tmp_path):
    rng, seconds = np.random.default_rng(0), {}
    pixels = [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(10)]
    depths = rng.integers(1, BLOCKS + 1, (1000, 14, 14))
    path = gallery(tmp_path, [record(n, pixels=pixels[n % 10], depth=depth) for n, depth in enumerate(depths)])

    def measure(limit, action, *args):
        begun = time.perf_counter()
        action(*args)
        browser.drawn()
        seconds[" ".join(map(str, args))] = round(time.perf_counter() - begun, 3)
        assert seconds[" ".join(map(str, args))] < limit, seconds

    measure(10, browser.open, path)
    for change in [("#search", "zebra"), ("#search", ""), ("#sort", "spread"), ("#blocks input", 3)]:
        measure(2, browser.choose, *change)
    print(f"{path.stat().st_size / 2**20:.1f} MiB;", seconds)
