"""The pages: what is in them, that nothing in a name gets out of its place, and how they behave in a browser."""

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
from PIL import Image

from utils import UserError
from visualization import heatmaps, html_pages
from visualization.heatmaps import Style
from visualization.records import ImageRecord

BLOCKS = 8
STYLE = Style(BLOCKS, size=32)
CLASSES = ["tabby cat", "espresso", "zebra", "class 10", "class 9"]
HOSTILE = [
    "</script><script>alert(1)</script>.jpg",
    "<img src=x onerror=alert(2)>",
    "\"'`><svg onload=alert(3)>",
    "{{7*7}} {% raw %} ${7*7} <!-- <script>",
    "two\nlines\tand a tab\u2028\u0000\x1b",
    "Żółw 斑馬 🦓 شجرة",
    "&lt;b&gt; &amp; \\u003c \\",
    "lone \udcff surrogate",
]
FACTS = [("images", "10,000"), ("top-1", "91.2 %")]


def record(index: int, size: int = 32, grid: int = 4, **changes) -> ImageRecord:
    """An image that no other index has, its patches of all depths; every third prediction wrong."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    values = {
        "index": index,
        "name": f"val/{index:04d}.jpg",
        "pixels": np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)),
        "depth": rng.integers(1, BLOCKS + 1, (grid, grid)).astype(np.uint8),
        "prefix_depth": rng.integers(1, BLOCKS + 1, 1).astype(np.uint8),
        "prediction": (index + (index % 3 == 0)) % len(CLASSES),
        "confidence": float(rng.uniform(0.2, 1)),
        "target": index % len(CLASSES),
        "macs": float(rng.uniform(2e8, 9e8)),
        "static_macs": 1e9,
    }
    return ImageRecord(**values | changes)


def gallery(
    folder: Path,
    records: list[ImageRecord],
    classes: list[str] = CLASSES,
    title: str = "A gallery",
    facts: list[tuple[str, str]] = FACTS,
) -> Path:
    path = folder / "index.html"
    html_pages.write_gallery(path, title, facts, records, classes, STYLE)
    return path


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (70, 40), color).save(file, "PNG")
    return file.getvalue()


def summary(folder: Path, title: str = "A summary", charts: list | None = None, gallery: str | None = None) -> Path:
    path = folder / "summary.html"
    html_pages.write_summary(path, title, FACTS, charts or [("Depths", "Half are 3.", png("red"))], gallery)
    return path


class Tags(HTMLParser):
    """The tags of a page with their attributes, and the text between them."""

    def __init__(self, path: Path):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, *names: str) -> list[str]:
        return [attrs[name] for _, attrs in self.found for name in names if name in attrs]


def data_of(path: Path) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1]
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def picture_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


# What is in them ----------------------------------------------------------------------------------


def test_gallery_holds_what_was_measured(tmp_path):
    one, other = record(3), record(4, size=128, target=-1, pixels=np.full((96, 128, 3), 77, np.uint8))
    data = data_of(gallery(tmp_path, [one, other]))
    assert data["colors"] == [
        "#" + bytes(color).hex() for color in heatmaps.colors(np.arange(BLOCKS + 1), STYLE).tolist()
    ]
    first, second = data["images"]
    assert first["depth"] == one.depth.ravel().tolist()
    assert first["columns"] == 4
    assert (first["class"], first["prediction"], first["wrong"]) == ("class 10", "class 9", True)
    assert (second["class"], second["wrong"]) == (None, False)
    assert (second["width"], second["height"]) == (128, 96)
    for name, value in {"confidence": one.confidence, "mean_depth": one.mean_depth, "spread": one.depth_spread}.items():
        assert first[name] == pytest.approx(value, abs=1e-4)
    assert first["saved"] == pytest.approx(1 - one.macs / 1e9, abs=1e-4)
    assert np.array_equal(np.asarray(picture_of(first["image"])), one.pixels)
    assert picture_of(second["image"]).format == "JPEG"


def test_gallery_of_a_diverged_network_is_valid_json(tmp_path):
    entry = data_of(gallery(tmp_path, [record(0, confidence=float("nan"))]))["images"][0]
    assert entry["confidence"] is None


def test_gallery_without_images_says_so(tmp_path):
    text = gallery(tmp_path, []).read_text()
    assert "No images here yet" in text
    assert 'id="search"' not in text


@pytest.mark.parametrize("known", [True, False])
def test_gallery_offers_classes_only_where_some_are_known(tmp_path, known):
    text = gallery(tmp_path, [record(0, target=-1), record(1, target=1 if known else -1)]).read_text()
    assert ('id="wrong"' in text) is known
    assert ('value="class_rank"' in text) is known


def test_summary_holds_facts_and_charts(tmp_path):
    charts = [("Depths", "Half are 3.", png("red")), ("Tokens", "A third is left.", png("blue"))]
    page = Tags(summary(tmp_path, charts=charts, gallery="gallery/index.html"))
    shown = [(attrs["alt"], base64.b64decode(attrs["src"].partition(",")[2])) for t, attrs in page.found if t == "img"]
    assert shown == [(explanation, content) for _, explanation, content in charts]
    assert {"images", "10,000", "top-1", "91.2 %", "Depths", "Half are 3.", "Tokens"} <= set(page.texts)
    assert [attrs["href"] for tag, attrs in page.found if tag == "a"] == ["gallery/index.html"]
    assert "a" not in dict(Tags(summary(tmp_path)).found)


# Nothing gets in, nothing gets out ----------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_names(tmp_path, name):
    plain = Tags(gallery(tmp_path, [record(0)], facts=FACTS[:1]))
    path = gallery(tmp_path, [record(0, name=name)], classes=[name] * 5, title=name, facts=[(name, name)])
    page = Tags(path)
    assert [tag for tag, _ in page.found] == [tag for tag, _ in plain.found]
    entry = data_of(path)["images"][0]
    assert {entry["name"], entry["class"], entry["prediction"]} == {name}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_words_in_a_summary_stay_words(tmp_path, name):
    plain = Tags(summary(tmp_path))
    page = Tags(summary(tmp_path, title=name, charts=[(name, name, png("red"))]))
    assert [tag for tag, _ in page.found] == [tag for tag, _ in plain.found]
    assert page.values("alt") == [name.replace("\udcff", "?")]


def test_pages_need_no_other_file(tmp_path):
    for path in (gallery(tmp_path, [record(0)]), summary(tmp_path)):
        addresses = Tags(path).values("src", "href", "srcset", "action", "poster", "data", "xlink:href")
        assert addresses
        assert all(address.startswith("data:image/") for address in addresses)
        assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", path.read_text())
        assert "default-src 'none'" in path.read_text()  # and browsers see to it


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = gallery(tmp_path, [record(0)])
    before = path.read_bytes()

    def full_disk(partial, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(UserError, match="No space"):
            gallery(tmp_path, [record(1)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    gallery(tmp_path, [record(1)])
    assert path.read_bytes() != before


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, 1..21; WCAG 2.2."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_controls_stand_out(tmp_path, theme):
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", summary(tmp_path).read_text())
    color = {name: pair[theme] for name, *pair in found}
    for ground in ("paper", "card"):
        for text in ("ink", "muted", "accent", "warning"):
            assert contrast(color[text], color[ground]) >= 4.5, (text, ground)
        assert contrast(color["edge"], color[ground]) >= 3, ground
    assert contrast(color["on-accent"], color["accent"]) >= 4.5


# In a browser -------------------------------------------------------------------------------------


class Browser:
    """Chromium without a window, and what the tests do with it."""

    def __init__(self, driver):
        self.driver, self.run, self.width = driver, driver.execute_script, 0

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.width = width
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        preference = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})
        self.driver.get(path.as_uri())
        self.run("try { localStorage.clear(); } catch {}")

    def until(self, condition: str, *args) -> None:
        """Waits until it holds, in JavaScript."""
        deadline = time.monotonic() + 10
        while not self.run(f"return {condition}", *args):
            assert time.monotonic() < deadline, f"never: {condition}"
            time.sleep(0.02)

    def drawn(self) -> None:
        """Waits until all is drawn."""
        self.until("shown.length === 0 || (near.size > 0 && [...near.values()].every(Boolean))")
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def screenshot(self, path: Path) -> np.ndarray:
        """[height, width, 3] uint8; also as a file."""
        assert self.driver.save_screenshot(str(path))
        return np.asarray(Image.open(path).convert("RGB"))

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def choose(self, selector: str, value: object, event: str = "input") -> None:
        script = "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        self.run(f"{script} e.dispatchEvent(new Event(arguments[2], {{bubbles: true}}))", selector, value, event)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def order(self) -> list[int]:
        """The indices of the images that are shown."""
        return self.run("return [...document.querySelectorAll('#grid > li')].map((card) => card.item.index)")

    def focused(self) -> int | str | None:
        """The index of the image whose card has the focus, or the id of what has it."""
        return self.run("const e = document.activeElement; return e.parentNode.item?.index ?? e.id")

    def pixels(self, selector: str) -> np.ndarray:
        """[H, W, 3] int, of a canvas."""
        self.drawn()
        uri = self.run("return document.querySelector(arguments[0]).toDataURL()", selector)
        return np.asarray(picture_of(uri).convert("RGB")).astype(int)

    def overflow(self) -> float:
        """How much wider the page is than the window."""
        return self.run("return document.documentElement.scrollWidth") - self.width  # innerWidth grows with a wide page


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver_program:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(chromium):
    """After each test: nothing was said on the console, above all no error."""
    yield chromium
    assert chromium.driver.get_log("browser") == []


@pytest.fixture(scope="module")
def some() -> list[ImageRecord]:
    return [record(index) for index in range(20)]


@pytest.fixture(scope="module")
def page(tmp_path_factory, some) -> Path:
    return gallery(tmp_path_factory.mktemp("gallery"), some)


def test_search_by_class_prediction_and_file(browser, page, some):
    browser.open(page)
    assert browser.text("#count") == "20 of 20 images"
    browser.press("/", *"ZEBRA")
    assert browser.focused() == "search"
    expected = [one.index for one in some if 2 in {one.target, one.prediction}]
    assert browser.order() == expected
    assert {some[i].target for i in expected} > {2}, "none by its prediction"
    assert browser.text("#count") == f"{len(expected)} of 20 images"
    browser.choose("#search", "0013.jpg")
    assert browser.order() == [13]
    browser.choose("#search", "nowhere")
    assert browser.order() == []
    assert browser.text("#blocks output") == "block 4: 0% live"
    browser.click("#clear")
    assert len(browser.order()) == 20


SORTS = {
    "place": lambda one: one.index,
    "class_rank": lambda one: sorted(CLASSES, key=lambda name: (name.split()[0], len(name))).index(CLASSES[one.target]),
    "mean_depth": lambda one: one.mean_depth,
    "spread": lambda one: one.depth_spread,
    "confidence": lambda one: one.confidence,
}


def test_sort(browser, tmp_path, some):
    shuffled = [some[i] for i in np.random.default_rng(0).permutation(20)]
    browser.open(gallery(tmp_path, shuffled))
    assert browser.order() == list(range(20))
    for value, key in SORTS.items():
        browser.choose("#sort", value, "change")
        assert browser.order() == [one.index for one in sorted(some, key=key)], value
        browser.click("#direction")
        assert browser.order() == [one.index for one in sorted(some, key=lambda one: -key(one))], value
        browser.click("#direction")


def test_unknown_values_come_last(browser, tmp_path):
    nan = float("nan")
    some = [record(0, confidence=nan, target=-1), record(1, confidence=0.5), record(2, confidence=0.9)]
    browser.open(gallery(tmp_path, some))
    browser.choose("#sort", "confidence", "change")
    assert browser.order() == [1, 2, 0]
    browser.click("#direction")
    assert browser.order() == [2, 1, 0]
    browser.choose("#sort", "class_rank", "change")
    assert browser.order() == [2, 1, 0]


def test_wrong_only_and_told_apart_by_more_than_colour(browser, page, some):
    browser.open(page)
    browser.click(".check")
    assert browser.order() == [one.index for one in some if one.is_wrong] == [0, 3, 6, 9, 12, 15, 18]
    assert browser.text("#grid li .verdict").startswith("✗espresso")
    assert browser.run("return document.querySelector('#grid .mark').ariaLabel") == "wrong:"
    browser.click(".check")
    assert browser.text("#grid li:nth-child(2) .verdict").startswith("✓right")


def test_canvases_show_what_pillow_draws(browser, page, some):
    browser.open(page)
    one, card = some[1], "#grid li:nth-child(2) canvas"
    size = (32, 32)
    for block in (1, 3, BLOCKS):
        browser.choose("#blocks input", block)
        drawn = browser.pixels(card)
        assert np.abs(drawn - np.asarray(heatmaps.in_block(one, block, STYLE))).max() <= 2
        live = np.kron(one.depth >= block, np.ones((8, 8), bool))
        assert np.array_equal(drawn[live], one.pixels[live])
        assert np.ptp(drawn[~live], axis=1).max(initial=0) <= 1, "a halted patch is not grey"
    expected = {
        "depth": heatmaps.heat_map(one.depth, size, STYLE),
        "both": heatmaps.overlay(one, STYLE),
        "image": Image.fromarray(one.pixels),
    }
    for view, picture in expected.items():
        browser.click(f".views label:has([value={view}])")
        assert np.abs(browser.pixels(card) - np.asarray(picture)).max() <= 2, view


def test_halted_patches_fade_into_a_dark_page(browser, page, some):
    browser.open(page, scheme="dark")
    halted = np.kron(some[1].depth < 4, np.ones((8, 8), bool))
    drawn = browser.pixels("#grid li:nth-child(2) canvas")
    assert drawn[halted].max() < 100 < heatmaps.HALTED
    assert np.array_equal(drawn[~halted], some[1].pixels[~halted])


def test_slider_says_what_is_live_among_the_shown(browser, page, some):
    browser.open(page)
    browser.click(".views label:has([value=depth])")
    assert browser.run("return document.querySelector('#blocks').classList.contains('colored')")
    browser.choose("#blocks input", 5)
    assert browser.run("return document.querySelector('[value=live]').checked"), "the slider shows what it does"
    share = np.mean([one.depth >= 5 for one in some])
    assert browser.text("#blocks output") == f"block 5: {share:.0%} live"
    browser.choose("#search", "0007")
    assert browser.text("#blocks output") == f"block 5: {np.mean(some[7].depth >= 5):.0%} live"
    browser.press("]", "]")
    assert browser.text("#blocks output").startswith("block 7")


def test_thumb_stands_over_its_tick(browser, page):
    for width in (1280, 375):
        browser.open(page, width=width)
        ends = browser.run("""
            const [bar, ticks] = [document.querySelector("#blocks input"), document.querySelectorAll("#blocks li")];
            const middle = (box) => (box.left + box.right) / 2;
            const [box, first, last] = [bar, ticks[0], ticks[ticks.length - 1]].map((e) => e.getBoundingClientRect());
            return [box.left + 10 - middle(first), box.right - 10 - middle(last)];""")
        assert np.abs(ends).max() < 1


def test_play_runs_through_the_blocks(browser, tmp_path, some, monkeypatch):
    monkeypatch.setattr(html_pages, "FRAME_SECONDS", 0.01)
    browser.open(gallery(tmp_path, some[:3]))
    assert browser.run("return block") == 4, "nothing moves by itself"
    browser.click("#blocks .play")
    assert browser.run("return document.querySelector('.play').ariaLabel") == "Pause"
    browser.until(f"block === {BLOCKS}")
    browser.until("block < 4")  # and begins again
    browser.click("#blocks .play")
    at = browser.run("return block")
    time.sleep(0.1)
    assert browser.run("return block") == at


def test_enlarge_and_look_through(browser, page, some):
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    browser.choose("#search", "zebra")
    shown = browser.order()
    browser.run("document.querySelector('#grid li:nth-child(2) button').focus()")
    browser.press(Keys.ENTER)
    browser.until("document.querySelector('#one').open")
    one = some[shown[1]]
    depth_map = np.asarray(heatmaps.heat_map(one.depth, (32, 32), STYLE))
    assert np.array_equal(browser.pixels("#one canvas[data-view=depth]"), depth_map)
    assert np.array_equal(browser.pixels("#one canvas[data-view=image]"), one.pixels)
    figures = browser.run("return [...document.querySelectorAll('#one-figures dd')].map((e) => e.textContent)")
    assert figures == [
        CLASSES[one.target],
        f"✗ wrong: {CLASSES[one.prediction]}" if one.is_wrong else f"✓ {CLASSES[one.prediction]}",
        f"{one.confidence:.1%}",
        f"{one.mean_depth:.2f} of {BLOCKS}",
        f"{one.depth_spread:.2f}",
        f"{one.macs / 1e6:.0f} M",
        f"{one.saved:.0%}",
        one.name,
    ]
    browser.press(Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_DOWN)
    assert browser.text("#one output") == f"block 5: {heatmaps.live_share(one, 5):.0%} live"
    drawn = browser.pixels("#one canvas[data-view=live]")
    assert np.abs(drawn - np.asarray(heatmaps.in_block(one, 5, STYLE))).max() <= 2
    browser.press(Keys.ARROW_RIGHT)
    assert browser.text("#one-place") == f"3 of {len(shown)}"
    assert np.array_equal(browser.pixels("#one canvas[data-view=image]"), some[shown[2]].pixels)
    browser.press(Keys.ESCAPE)
    browser.until("!document.querySelector('#one').open && opened === null")
    assert browser.focused() == shown[2], "the focus goes to the card of the image that was seen last"


def test_enlarged_wraps_around_and_closes_by_mouse(browser, page):
    from selenium.webdriver import ActionChains

    browser.open(page)
    browser.click("#grid li button")
    browser.click("#previous")
    assert browser.text("#one-place") == "20 of 20"
    browser.click("#next")
    assert browser.text("#one-place") == "1 of 20"
    browser.click("#close")
    browser.until("opened === null")
    browser.click("#grid li button")
    ActionChains(browser.driver).move_by_offset(5, 5).click().perform()
    browser.until("opened === null")
    assert browser.focused() == 0


def test_arrows_move_between_cards(browser, page):
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    columns = browser.run("return getComputedStyle(grid).gridTemplateColumns.split(' ').length")
    assert columns > 3
    browser.run("document.querySelector('.card').focus()")
    moves = {
        Keys.ARROW_RIGHT: 1,
        Keys.ARROW_DOWN: columns + 1,
        Keys.ARROW_LEFT: columns,
        Keys.ARROW_UP: 0,
        Keys.END: 19,
        Keys.HOME: 0,
    }
    for key, place in moves.items():
        browser.press(key)
        assert browser.focused() == place
    browser.press(Keys.ARROW_LEFT)
    assert browser.focused() == 0


def test_everything_is_reached_by_tab_and_seen(browser, page):
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    reached = []
    for _ in range(11):
        browser.press(Keys.TAB)
        reached.append(browser.run("const e = document.activeElement; return e.id || e.name || e.className || e.type"))
    wanted = [
        "ask",
        "theme",
        "search",
        "sort",
        "direction",
        "wrong",
        "view",
        "button icon play",
        "range",
        "card",
        "card",
    ]
    assert reached == wanted
    assert browser.run("return getComputedStyle(document.activeElement).outlineWidth") == "3px"


def test_help_lists_the_keys(browser, page):
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    browser.press("?")
    assert browser.run("return document.querySelector('#help').open")
    browser.press("/")
    assert browser.focused() != "search"
    browser.press(Keys.ESCAPE)
    browser.until("!document.querySelector('#help').open")


def test_theme_follows_the_system_until_switched(browser, page, tmp_path):
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    browser.open(page, scheme="dark")
    dark = browser.run(ground)
    browser.open(page)
    light = browser.run(ground)
    assert dark != light
    browser.click("#theme")
    assert browser.run(ground) == dark
    halted = browser.pixels("#grid canvas")
    browser.driver.refresh()
    assert browser.run(ground) == dark, "it is remembered"
    assert np.array_equal(browser.pixels("#grid canvas"), halted)
    browser.click("#theme")
    assert browser.run(ground) == light
    browser.run("localStorage.clear()")


@pytest.mark.parametrize("width", [1280, 375, 320])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    long = "Kakatoe_galerita" * 12
    path = gallery(tmp_path, [record(i, name=long) for i in range(6)], classes=[long] * 5, title=long)
    browser.open(path, width=width)
    assert browser.overflow() <= 0
    columns = browser.run("return getComputedStyle(grid).gridTemplateColumns.split(' ').length")
    assert columns > 3 if width > 1000 else columns == 2
    browser.click("#grid li button")
    browser.drawn()
    assert browser.run("return one.scrollWidth - one.clientWidth") <= 0
    browser.open(
        summary(tmp_path, title=long, charts=[(long, long, png("red"))] * 3, gallery="index.html"), width=width
    )
    assert browser.overflow() <= 0
    tops = browser.run("return [...document.querySelectorAll('figure')].map((e) => e.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) is (width > 1000)


def test_hostile_names_do_nothing_in_a_browser(browser, tmp_path):
    names = [*HOSTILE[:-1], "plain"]
    some = [record(i, name=name, target=i, prediction=i) for i, name in enumerate(names)]
    browser.open(gallery(tmp_path, some, classes=names))
    assert browser.run("return [...document.querySelectorAll('#grid .name')].map((e) => e.textContent)") == names
    for place, name in enumerate(names):
        browser.run("document.querySelectorAll('.card')[arguments[0]].click()", place)
        assert browser.text("#one-name") == browser.text("#one-figures div:last-child dd") == name
        browser.run("document.querySelector('#one').close()")
        browser.until("opened === null")
    browser.choose("#search", "{{7*7}}")
    assert browser.order() == [3]
    browser.open(summary(tmp_path, title=HOSTILE[0], charts=[(HOSTILE[1], HOSTILE[2], png("red"))]))
    assert (browser.text("h1"), browser.text("h2"), browser.text("figcaption p")) == tuple(HOSTILE[:3])


def test_only_canvases_near_the_viewport_are_drawn(browser, tmp_path):
    browser.open(gallery(tmp_path, [record(i) for i in range(200)]), width=800)
    browser.drawn()
    drawn = "return [...document.querySelectorAll('#grid canvas')].map((e) => e.width > 0)"
    at_first = browser.run(drawn)
    assert at_first[0]
    assert 4 <= sum(at_first) < 60
    browser.run("scrollTo(0, document.documentElement.scrollHeight)")
    browser.until("document.querySelector('#grid li:last-child canvas').width > 0")
    browser.drawn()
    at_last = browser.run(drawn)
    assert not at_last[0], "what has left the window is let go"
    assert sum(at_last) < 60
    browser.run("arrive(items[0].card); leave(items[0].card)")  # it passes by too fast to be decoded
    browser.driver.execute_async_script("setTimeout(arguments[0], 200)")
    assert not browser.run(drawn)[0]


@pytest.mark.slow
def test_a_thousand_images_stay_fluid(browser, tmp_path):
    rng = np.random.default_rng(0)
    some = []
    for index in range(1000):
        one = record(index, size=224, grid=14)
        noise = rng.integers(0, 24, one.pixels.shape, dtype=np.uint8)
        some.append(record(index, size=224, grid=14, pixels=one.pixels // 2 + noise))
    begun = time.perf_counter()
    path = gallery(tmp_path, some)
    seconds = {"write": time.perf_counter() - begun}
    begun = time.perf_counter()
    browser.open(path)
    browser.drawn()
    seconds["load"] = time.perf_counter() - begun

    def measure(name: str, selector: str, value: object, event: str = "input") -> None:
        seconds[name] = browser.driver.execute_async_script(
            """const [selector, value, event, done] = arguments;
            const [begun, element] = [performance.now(), document.querySelector(selector)];
            element.value = value;
            element.dispatchEvent(new Event(event, {bubbles: true}));
            requestAnimationFrame(() => requestAnimationFrame(() => done((performance.now() - begun) / 1000)));""",
            *(selector, value, event),
        )

    measure("search", "#search", "zebra")
    measure("search for all", "#search", "")
    measure("sort", "#sort", "spread", "change")
    browser.drawn()
    for block in range(1, BLOCKS + 1):
        measure(f"slide to {block}", "#blocks input", block)
    print(f"{path.stat().st_size / 2**20:.1f} MiB;", ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()))
    assert seconds.pop("write") < 60
    assert seconds.pop("load") < 10
    assert max(seconds.values()) < 1, seconds


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (375, 812)])
def test_screenshots_at_desktop_and_phone_width(browser, page, tmp_path, width, height, scheme):
    """Kept in pytest's folder for whoever wants to look: gallery, enlarged image, and summary."""
    browser.open(page, width, height, scheme)
    browser.drawn()
    shots = {"gallery": browser.screenshot(tmp_path / "gallery.png")}
    browser.click("#grid li button")
    browser.drawn()
    shots["enlarged"] = browser.screenshot(tmp_path / "enlarged.png")
    browser.open(summary(tmp_path), width, height, scheme)
    shots["summary"] = browser.screenshot(tmp_path / "summary.png")
    for name, shot in shots.items():
        assert shot.shape[:2] == (height, width)
        assert shot.reshape(-1, 3).std(axis=0).max() > 5, f"{name} is blank"
    ground = {name: np.median(shot) for name, shot in shots.items() if name != "enlarged"}
    assert all(value > 200 if scheme == "light" else value < 60 for value in ground.values()), ground
