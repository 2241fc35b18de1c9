"""The report in a real browser. Needs Chromium and its driver (Debian: chromium, chromium-driver)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG
from fake_run import HOSTILE, make_run
from test_report import island_of

import npd.report.page
from npd.records import EvaluationLine
from npd.report.page import write_comparison, write_report
from npd.store import Store

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="no browser: pages are not opened; apt-get install chromium chromium-driver",
)

LONG = "x" * 100_000
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,1000",
)


OWN = ("chrome:", "chrome-untrusted:", "chrome-search:", "devtools:")  # what the browser shows of itself


def is_of(request: dict[str, Any], page: str) -> bool:
    """Was this request made by a page: by its document, by one inside it, or because of what stands in it?

    The browser makes some of its own, as for its start page, whenever it finds the time.
    """
    initiator = request["initiator"]
    stack = initiator.get("stack", {}).get("callFrames", [])
    places = [request["documentURL"], initiator.get("url", ""), *(frame["url"] for frame in stack)]
    return any(place == page or place.startswith(("about:", "data:", "blob:")) for place in places)


class Page:
    """A page opened from disk, with what it logged and what it asked for."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, file: Path, width: int = 1440, dark: bool = False) -> None:
        screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        scheme = {"features": [{"name": name, "value": value} for name, value in wishes.items()]}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.url = file.resolve().as_uri()
        self.driver.get(self.url)
        self.wait("document.documentElement.dataset.ready === 'true'")

    def wait(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, HANG).until(lambda d: d.execute_script(f"return {condition}"), condition)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def complaints(self) -> list[str]:
        """What the page has logged since the last look, and what the browser has of it."""
        entries = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in entries if not message.startswith(OWN)]

    def asked(self) -> set[str]:
        """The addresses that the page has asked for since the last look, its own among them."""
        sent = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        requests = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        urls = {request["request"]["url"] for request in requests if is_of(request, self.url)}
        return {url for url in urls if not url.startswith(("data:", "blob:"))}

    def assert_in_order(self) -> None:
        """Nothing was complained of, nothing asked for but the page, every plot is drawn, and nothing lies beside it."""
        assert self.complaints() == []
        assert self.asked() == {self.url}
        plots = self.all(".plot")
        assert plots
        for plot in plots:
            assert plot.find_elements("css selector", "svg.main-svg"), plot.get_attribute("id")
        assert self.run("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        assert self.run("return window.hacked") is None


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.timeouts = {"script": int(1000 * HANG), "pageLoad": int(1000 * HANG)}
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    connection: Any = driver.command_executor
    connection.client_config.timeout = 2 * HANG
    start = driver.current_window_handle
    driver.switch_to.new_window("tab")  # an empty one
    empty = driver.current_window_handle
    driver.switch_to.window(start)
    driver.close()
    driver.switch_to.window(empty)
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    path = make_run(tmp_path_factory.mktemp("page") / "run", schedule={"kl_budget": 0.03})
    figures = {"eval/sums/accuracy": 0.5, "eval/sums/accuracy_low": 0.4, "eval/sums/accuracy_high": 0.6}
    for step in (0, 30):
        Store(path).append_metrics(EvaluationLine(step, figures))
    write_report(path)
    return path


def test_what_a_page_asks_for_is_known_from_what_the_browser_does(page, tmp_path):
    """Every way out of a page is seen, also that of what it embeds; the browser's start page is another matter."""
    (tmp_path / "inner.html").write_text('<img src="http://127.0.0.1:9/inner">')
    (tmp_path / "page.html").write_text(
        """<html data-ready="true"><img src="http://127.0.0.1:9/img"><iframe src="inner.html"></iframe>
        <iframe srcdoc='<img src="http://127.0.0.1:9/srcdoc">'></iframe><link rel=prefetch href="http://127.0.0.1:9/link">
        <script>fetch("http://127.0.0.1:9/fetch").catch(() => 0); navigator.sendBeacon("http://127.0.0.1:9/beacon");</script>"""
    )
    page.open(tmp_path / "page.html")
    wanted = {f"http://127.0.0.1:9/{name}" for name in ("img", "link", "srcdoc", "fetch", "beacon")}
    wanted |= {(tmp_path / name).as_uri() for name in ("page.html", "inner.html")}
    seen: set[str] = set()
    complaints: list[str] = []
    deadline = time.monotonic() + HANG
    while not (seen >= wanted and complaints) and time.monotonic() < deadline:
        seen |= page.asked()
        complaints += page.complaints()
        time.sleep(0.05)
    assert seen == wanted
    assert complaints
    start = {"url": "chrome://new-tab-page-third-party/", "type": "parser"}
    icon = {"request": {"url": "chrome://favicon2/?size=24"}, "documentURL": start["url"], "initiator": start}
    assert not is_of(icon, page.url)


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_every_page_is_in_order(page, run_dir, tmp_path, width, dark):
    page.open(run_dir / "report.html", width, dark)
    page.assert_in_order()
    fills = page.run(
        "return [...document.querySelectorAll('.strip')].map(s => [...s.children].map(e => getComputedStyle(e).background))"
    )
    assert [len(set(strip)) for strip in fills] == [2, 3, 3, 3]  # train, wait; generate, score, other; verdicts, twice
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark


def test_the_theme_is_toggled(page, run_dir):
    page.open(run_dir / "report.html")
    seen = []
    for _ in range(3):
        page.find("#theme").click()
        seen.append(page.run("return document.documentElement.dataset.theme"))
    assert sorted(set(seen)) == ["dark", "light"]
    page.wait("document.documentElement.dataset.drawn !== undefined")
    assert page.complaints() == []


def shown(page: Page) -> list[list[str]]:
    cells = "return [...document.querySelectorAll('#browser tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    rows: list[list[str]] = page.run(cells)
    return rows


def test_filter_sort_and_search_by_clicking(page, run_dir):
    page.open(run_dir / "report.html")
    rows = shown(page)
    assert len(rows) == 80
    verdict = page.all(".filters select")[0]
    for option in verdict.find_elements("tag name", "option"):
        option.click()
        want = option.text
        assert shown(page) == [row for row in rows if want in ("all", row[0])]
    verdict.find_elements("tag name", "option")[0].click()
    delta = page.all("#browser thead button")[1]

    def number(row: list[str]) -> float:
        return float(row[1].replace("−", "-"))

    delta.click()
    assert [number(row) for row in shown(page)] == sorted(number(row) for row in rows)
    assert page.all("#browser thead th")[1].get_attribute("aria-sort") == "ascending"
    delta.click()
    assert [number(row) for row in shown(page)] == sorted((number(row) for row in rows), reverse=True)
    page.find(".filters input").send_keys("w13 ")
    found = shown(page)
    assert 0 < len(found) < len(rows)
    assert f"{len(found)} of 80 samples" in page.find("#browser .note").text
    for row in page.all("#browser tbody tr"):
        row.click()
        assert "w13 " in page.find(".sample").get_attribute("textContent")


def test_the_keyboard_reaches_samples_and_tokens(page, run_dir):
    from selenium.webdriver.common.keys import Keys

    page.open(run_dir / "report.html")
    sample = page.find("#browser .list")
    before = page.find(".sample dd").text
    sample.send_keys(Keys.ARROW_DOWN)
    assert page.find(".sample dd").text != before
    text = page.all(".sample .text")[1]
    text.send_keys(Keys.ARROW_RIGHT)
    told = page.find(".told").text
    assert told.startswith("Token 1: “")
    assert "student" in told
    assert "teacher" in told
    reached = page.run(
        "return [...document.querySelectorAll('a[href], button, input, select, summary, [tabindex=\"0\"]')]"
        ".every(e => e.tabIndex >= 0)"
    )
    assert reached
    unnamed = page.run(
        "return [...document.querySelectorAll('button, input, select, [role=img], [role=region]')].filter(e => "
        "!(e.getAttribute('aria-label') || e.textContent || (e.labels || [])[0])).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_of_a_hostile_run_is_executed(page, tmp_path, width):
    path = make_run(tmp_path / "run", words=[*HOSTILE, LONG], sources=tuple(HOSTILE[:4]))
    (path / "logs").mkdir()
    (path / "logs/refresh-0.log").write_text("</pre><script>window.hacked=8</script>\x1b[0m")
    page.open(write_report(path), width)
    rows = page.all("#browser tbody tr")
    longest = 0
    for row in rows:  # every sample is looked at
        page.run("arguments[0].click()", row)
        longest = max(longest, page.run("return document.querySelector('.sample').textContent.length"))
    assert longest > len(LONG)
    page.assert_in_order()
    said = page.find("main").get_attribute("textContent")
    for word in HOSTILE[:4]:
        assert word in said
    assert not page.all("#main script, #main img, #main a[href^=http]")


def test_a_sample_of_unseen_characters_is_shown(page, tmp_path):
    unseen = {"U+202E × 150,000": "\u202e" * 150_000, "U+0000 U+0001": "\x00\x01" * 100_000, "U+200B": "a\u200b" * 150_000}
    path = make_run(tmp_path / "run", words=[*unseen.values(), *"bcdefghijklmnop"])
    report = write_report(path)
    page.open(report)
    page.assert_in_order()
    texts = ["".join(sample["pieces"]) for sample in island_of(report.read_text())["samples"]]
    for named, characters in unseen.items():
        row = min((i for i, text in enumerate(texts) if characters in text), key=lambda i: len(texts[i]))
        page.run("arguments[0].click()", page.all("#browser tbody tr")[row])
        assert named in page.run("return document.querySelectorAll('.sample .text')[1].textContent")
    assert page.run("return Math.max(...[...document.querySelectorAll('.t')].map(t => t.childNodes.length))") > 150_000


def test_plots_are_drawn_where_samples_cannot_be(page, run_dir, tmp_path):
    broken = (
        (run_dir / "report.html").read_text().replace("function browser(", "function browser() { throw 1; }\nfunction x(")
    )
    (tmp_path / "broken.html").write_text(broken)
    page.open(tmp_path / "broken.html")
    assert all(plot.find_elements("css selector", "svg.main-svg") for plot in page.all(".plot"))
    assert "The samples can't be shown: 1" in page.find("#browser").text


def test_a_name_that_looks_like_a_colour_is_a_name(page, tmp_path):
    path = make_run(tmp_path / "run", sources=("@run0", "@b/0.5"))
    page.open(write_report(path))
    page.assert_in_order()
    labels = page.run("return document.querySelector('[data-figure=by-source]').textContent")
    assert "@run0" in labels
    assert "@b/0.5" in labels


def test_a_comparison_is_in_order(page, run_dir, tmp_path):
    other = make_run(tmp_path / "other", steps=2000, loss={"kd_weight": 0.5})
    page.open(write_comparison([run_dir, other], tmp_path / "compare.html"), 390)
    page.assert_in_order()


WIDTHS = (360, 600, 860, 1100, 1440)
BESIDE = """
const done = arguments[0], beside = [], name = (e) => `${e.tagName} ${e.className} ${e.textContent.slice(0, 60)}`;
requestAnimationFrame(() => requestAnimationFrame(() => {
  if (document.documentElement.scrollWidth > innerWidth) beside.push("the page");
  for (const card of document.querySelectorAll(".card, .tiles > div")) {
    const { left, right } = card.getBoundingClientRect();
    if (left < 0 || right > innerWidth + 0.5 || card.scrollWidth > card.clientWidth) beside.push(name(card));
  }
  for (const table of document.querySelectorAll("table")) {
    const box = table.parentElement, { right } = box.getBoundingClientRect();
    if (box.scrollWidth > box.clientWidth || table.scrollWidth > box.clientWidth) beside.push(name(table));
    for (const cell of table.querySelectorAll("th, td")) {
      if (cell.getBoundingClientRect().right > right + 0.5) beside.push(name(cell));
    }
  }
  done(beside);
}));
"""


def widen(page: Page, width: int) -> list[str]:
    """Show the page that is open at another width; what lies beside its card or the page."""
    screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.wait(f"innerWidth === {width}")
    found: list[str] = page.driver.execute_async_script(BESIDE)
    return found


def test_a_table_that_runs_beside_its_card_is_seen(page, run_dir, tmp_path):
    """What the tests below hold can fail: without the script that lays tables down, one does run beside its card."""
    text = (run_dir / "report.html").read_text().replace("function fitTables() {", "function fitTables() { return;")
    (tmp_path / "broken.html").write_text(text)
    page.open(tmp_path / "broken.html", 360)
    assert any("generation" in found for found in widen(page, 360))


def hostile_runs(folder: Path, count: int) -> list[Path]:
    """Runs with long names and values, all of which differ."""
    paths = []
    for i in range(count):
        name = (
            f"{i}-{'a_very_long_name_without_a_space' * 3}"
            if i % 2
            else f"run {i} {HOSTILE[i % len(HOSTILE)][:20]}".replace("/", "")
        )
        path = make_run(
            folder / name.replace("\x00", ""),
            generations=3,
            sources=(f"source-{'x' * 200}", "words of a source " * 10, HOSTILE[0]),
            student={"model": f"/models/{'deep/' * 30}student-{i}"},
            data={
                "train": f"/data/{'directory-of-prompts/' * 8}{i}.jsonl",
                "template_options": {"k" * 80: f"{'v' * 900}{i}"},
            },
            loss={"kd_weight": 0.1 + i / 100},
            seed=i % 3,
        )
        task = "task_with_a_name_" * 5
        figures = {f"eval/{task}/accuracy": 0.5, f"eval/{task}/accuracy_low": 0.4, f"eval/{task}/accuracy_high": 0.6}
        harness = {"eval/harness/h/acc": 123456789.123, "eval/harness/h/acc_stderr": 12345.6}
        for step in (0, 30):
            Store(path).append_metrics(EvaluationLine(step, figures | harness))
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [1, 9])
def test_no_table_runs_beside_its_card_at_any_width(page, tmp_path, count, monkeypatch):
    if count > 1:
        monkeypatch.setattr(npd.report.page, "plotly_packed", lambda: "")  # a hundred plots say nothing of tables
    paths = hostile_runs(tmp_path, count)
    file = write_report(paths[0]) if count == 1 else write_comparison(paths, tmp_path / "compare.html")
    page.open(file, WIDTHS[-1])
    for width in WIDTHS:
        assert widen(page, width) == [], f"at {width} pixels"
    assert page.run("return window.hacked") is None
    assert page.complaints() == []


def test_a_wide_screen_keeps_tables_tables(page, tmp_path, monkeypatch):
    """Of four runs, as of one; a phone gets lists, in which every cell says its column."""
    monkeypatch.setattr(npd.report.page, "plotly_packed", lambda: "")
    paths = [make_run(tmp_path / f"run-{i}", loss={"kd_weight": 0.1 + i / 10}) for i in range(4)]
    for file in (write_report(paths[0]), write_comparison(paths, tmp_path / "compare.html")):
        page.open(file)
        assert widen(page, 1440) == []
        assert page.all("table")
        assert not page.all("table.stacked")
        assert widen(page, 360) == []
        assert page.all("table.stacked")
        labels = (
            "return [...document.querySelectorAll('table.stacked tbody tr')].every(r => [...r.cells].slice(1).every("
            "(c, i) => c.dataset.label === r.closest('table').tHead.rows[0].cells[i + 1].textContent))"
        )
        assert page.run(labels)


def test_a_failed_run_is_in_order(page, tmp_path):
    path = make_run(tmp_path / "run", finished=False)
    page.open(write_report(path))
    page.assert_in_order()
    assert "stopped without a word" in page.find("#failure").text
    page.find("#failure .copy").click()
    page.wait("['Copied', 'Selected'].includes(document.querySelector('#failure .copy').textContent)")


def test_a_run_that_has_just_begun_is_in_order(page, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("run_dir: x\n")
    page.open(write_report(run_dir))
    assert not page.all(".plot")
    assert page.complaints() == []
