"""The search page in a real browser: what a person types, sees and presses. Skipped where there is no Chromium.

python -m pytest -m slow tests/retrieval/test_search_page.py
"""

import shutil
import threading
from collections.abc import Iterator

import pytest
from indexed import SCRIPT, TEXTS, LastLetters, make_index
from served import wait_until

from mlx_retrieval.inference.serving.engine import LIMITS
from mlx_retrieval.inference.serving.run import listen, server_of
from mlx_retrieval.retrieval.search_app import ServedSearcher, create_app

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(small, tmp_path_factory) -> Iterator[str]:
    """The address of a page, served as the command does."""
    index = make_index(tmp_path_factory.mktemp("browser"), small)
    server = server_of(create_app(ServedSearcher(index, reranker=LastLetters())), LIMITS)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium with its chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    only_here = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", only_here):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(browser, url) -> Iterator["Page"]:
    """The page as it is opened first; at the end, the console has no error."""
    page = Page(browser, url)
    page.open("")
    yield page
    assert browser.get_log("browser") == []


class Page:
    """What a person does with the page, and sees."""

    def __init__(self, browser, url: str):
        self.browser, self.url = browser, url

    def open(self, query: str) -> None:
        self.browser.get(self.url + query)
        wait_until(lambda: self.status not in ("", "Searching …"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.browser.find_element("css selector", selector)

    @property
    def status(self) -> str:
        return self.one("#status").text

    @property
    def places(self) -> list[str]:
        return self.browser.execute_script("return [...document.querySelectorAll('.place b')].map(e => e.textContent)")

    @property
    def focus(self) -> str:
        return self.browser.switch_to.active_element.text.split("\n")[0]

    def press(self, keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(keys)

    def ask(self, query: str) -> None:
        """Type a query and press Enter; return when its hits are there."""
        self.browser.execute_script("document.getElementById('status').textContent = ''")
        self.one("#query").clear()
        self.one("#query").send_keys(query + "\n")
        wait_until(lambda: "hit" in self.status or "found" in self.status or "has these words" in self.status)


def test_a_person_types_and_sees_hits(page):
    assert (
        page.status == f"{len(TEXTS)} chunks of tree."
        and page.browser.switch_to.active_element.get_attribute("id") == "query"
    )
    page.all(".modes span")[2].click()  # words
    page.one(".switch input").click()  # no reranker
    page.ask("hissing nightly boilers")
    assert page.places == ["docs/boiler.md:1"] and page.status.startswith("1 hit in ")
    assert {mark.text for mark in page.all("mark")} == {"Boiler", "hisses", "night"}
    assert [number.text for number in page.all(".no")] == ["1", "2"]
    page.ask("zebra")
    assert page.places == [] and "Nothing" in page.status


def test_modes_and_the_reranker_are_switches(page):
    page.ask("read the boiler")
    assert page.status.endswith("reranked") and len(page.places) == len(TEXTS)
    page.one(".switch input").click()
    wait_until(lambda: "hits in" in page.status and not page.status.endswith("reranked"))
    assert "rerank=0" in page.browser.current_url
    page.all(".modes span")[2].click()
    wait_until(lambda: "hits in" in page.status and len(page.places) == 3)
    assert "mode=bm25" in page.browser.current_url
    page.browser.back()
    wait_until(lambda: len(page.places) == len(TEXTS))
    assert page.all(".modes input")[0].is_selected()


def test_keys_go_through_hits_and_open_them(page):
    page.open("?q=read+the+boiler&rerank=0")
    first, second, *_ = page.places
    page.press("j")
    assert page.focus.startswith(first)
    page.press("j")
    assert page.focus.startswith(second)
    page.press("k")
    assert page.focus.startswith(first)
    page.press("\ue015")  # arrow down
    assert page.focus.startswith(second)
    page.press("\n")
    assert [item.get_attribute("class") for item in page.all("#hits > li")][:2] in (["", "open"], [None, "open"])
    assert page.browser.switch_to.active_element.get_attribute("aria-expanded") == "true"
    assert "open=" in page.browser.current_url
    page.press("/")
    assert page.browser.switch_to.active_element.get_attribute("id") == "query"
    page.press("x/y")
    assert page.one("#query").get_attribute("value") == "x/y"  # the marked query was replaced; / is a letter there


def test_a_link_brings_back_the_hit(page):
    page.open("?q=read+the+boiler&rerank=0")
    place = page.places[-1]
    link = page.all(".tail a")[-1].get_attribute("href")
    page.browser.get(link)
    wait_until(lambda: page.all("li.open"))
    assert page.one("li.open .place b").text == place and page.focus.startswith(place)
    page.open("?open=docs%2Fbike.md%230")
    assert page.places == ["docs/bike.md:1"] and "squeaks" in page.one("li.open pre").text
    page.open("?q=bike&mode=bm25&rerank=0&open=docs%2Fboiler.md%230")  # no longer among the hits
    wait_until(lambda: page.places == ["docs/boiler.md:1", "docs/bike.md:1"])


def test_markup_stays_text(page):
    page.open(f"?q={SCRIPT}&mode=bm25&rerank=0&path=odd.md")
    page.one(".place").click()
    assert SCRIPT in page.one("pre").text and "<b>bold</b>" in page.one("pre").text
    assert page.one("#query").get_attribute("value") == SCRIPT
    assert not page.all("pre script, pre b") and "broken" not in page.browser.title.removeprefix(SCRIPT)
    assert page.browser.title == f"{SCRIPT} – search"
    assert {mark.text for mark in page.all("mark")} >= {"script", "document", "title", "broken"}


def test_mistakes_are_said_on_the_page(page):
    page.open("?q=what+is+this&mode=bm25")
    assert "only stop words" in page.status and page.one("#status").get_attribute("class") == "bad"
    (entry,) = page.browser.get_log("browser")  # the browser itself notes an answer of 400
    assert "400" in entry["message"]


def test_the_page_fits_a_phone_and_names_its_parts(page):
    page.browser.set_window_size(500, 900)
    page.open("?q=read+the+boiler&open=src%2Freader.py%230")
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.browser.set_window_size(1200, 900)
    named = "return [...document.querySelectorAll('input, select, button, a, fieldset')].filter(e => !(e.labels?.length"
    named += " || e.getAttribute('aria-label') || e.querySelector('legend') || e.textContent.trim())).length"
    assert page.browser.execute_script(named) == 0
    assert page.one("#status").get_attribute("aria-live") == "polite" and page.one("html").get_attribute("lang") == "en"
