"""The page in a real browser: chat, stop, two models side by side, reload, a narrow window, and hostile answers."""

import shutil
import time

import pytest

import pedgpt.serving.server
from pedgpt.data import read_conversations
from pedgpt.serving import Scheduler

from .conftest import SIZES, Running

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, which drives the browser, is not installed")
support = pytest.importorskip("selenium.webdriver.support.ui")
alerts = pytest.importorskip("selenium.webdriver.support.expected_conditions")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
SIZE = {"deviceScaleFactor": 1, "mobile": False}
HOSTILE = (
    "<script>window.hurt = 1</script>\n\n<img src=x onerror='window.hurt = 1'>\n\n"
    "- **粗体** `code`\n- [x](javascript:window.hurt=1)\n\n```\n</pre><script>window.hurt = 1</script>\n```\n\n"
    "| a | b |\n|---|---|\n| <b onclick='window.hurt=1'>1</b> | 2 |\n"
)


class Scripted:
    """A decoder that writes a given text, a few characters a token."""

    text, size = "", 5

    def __init__(self, *_):
        self.rest, self.stopped = self.text, False

    def push(self, _):
        piece, self.rest = self.rest[: self.size], self.rest[self.size :]
        self.stopped = not self.rest
        return piece

    def finish(self):
        return ""


@pytest.fixture
def slow(models, chat):
    """A server of about 50 tokens a second."""
    scheduler = Scheduler(models, **SIZES)
    real = scheduler.cache.step
    scheduler.cache.step = lambda *arguments: (time.sleep(0.02), real(*arguments))[1]
    with Running(scheduler, chat) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the browser keeps its profile and puts what is exported."""
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def browser(folder):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={folder}/profile"):
        options.add_argument(flag)
    wanted = {"download.default_directory": str(folder), "intl.accept_languages": "zh-CN"}
    options.add_experimental_option("prefs", wanted)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    def __init__(self, driver, url, size=(1200, 900), key=""):
        self.driver = driver
        driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": size[0], "height": size[1], **SIZE})
        driver.get_log("browser")  # What earlier pages said is gone.
        driver.get(url)
        if key:
            alert = support.WebDriverWait(self.driver, 10).until(alerts.alert_is_present())
            alert.send_keys(key)
            alert.accept()
        self.until("return models.length > 0 && document.getElementById('first').options.length > 0")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, script, seconds=20):
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, script
            time.sleep(0.02)
        return found

    def click(self, name):
        self.driver.find_element("id", name).click()

    def choose(self, name, value):
        self.run("document.getElementById(arguments[0]).value = arguments[1]", name, value)

    def ask(self, text):
        box = self.driver.find_element("id", "text")
        box.send_keys(text)
        box.send_keys("\ue007")  # Enter

    def answers(self):
        return self.run("return current.turns.map((t) => t.answers.map((a) => [a.model, a.content, a.note || '']))")

    def finished(self):
        self.until("return running === null && current && current.turns.length")


@pytest.fixture
def open_page(browser):
    """open_page(url, ...): a page that has never been visited, in the one browser of all tests."""
    yield lambda url, **settings: Page(browser, url, **settings)
    browser.get("about:blank")


def test_a_conversation_goes_on_over_two_models_a_stop_and_a_reload(slow, open_page, folder, monkeypatch):
    expected = "观察体温，注意休息，必要时复诊。" * 3
    monkeypatch.setattr(Scripted, "text", expected)
    monkeypatch.setattr(Scripted, "size", 1)
    monkeypatch.setattr(pedgpt.serving.server, "StreamDecoder", Scripted)
    page = open_page(slow.url)
    page.choose("first", "base")
    page.ask("感冒")
    page.finished()
    ((first,),) = page.answers()
    assert first[:2] == ["base", expected]
    assert page.run("return document.querySelector('.mine').textContent") == "感冒"

    page.choose("second", "experts")
    page.ask("要吃药吗？")
    page.until("return current.turns[1]?.answers.every((a) => a.content.length > 3)")
    assert page.run("return !document.getElementById('stop').hidden")
    page.click("stop")
    page.finished()
    assert [(model, note) for model, _, note in page.answers()[1]] == [("base", "stopped"), ("experts", "stopped")]
    end = time.monotonic() + 5
    while slow.scheduler.active and time.monotonic() < end:
        time.sleep(0.01)
    assert not slow.scheduler.active
    assert page.run("return document.querySelector('.answers.two').children.length") == 2

    before = page.answers()
    page.driver.refresh()
    page.until("return models.length > 0")
    assert page.answers() == before and page.run("return document.querySelectorAll('.turn').length") == 2
    page.click("export")
    file = folder / "conversations.jsonl"
    end = time.monotonic() + 10
    while not (file.exists() and file.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    talks = read_conversations(file)
    assert [len(talk.messages) for talk in talks] == [4, 4] and talks[0].messages[1].content == expected

    page.click("new")
    page.choose("second", "")
    page.ask("肺炎")
    page.finished()
    assert page.run("return talks.length") == 2 and len(page.answers()) == 1
    page.run("[...document.querySelectorAll('.tools button')].find((b) => b.textContent === say('edit')).click()")
    assert page.run("return document.getElementById('text').value + current.turns.length") == "肺炎0"
    errors = [entry["message"] for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [error for error in errors if "favicon" not in error]


def test_what_a_model_writes_is_shown_and_never_run(server, open_page, monkeypatch):
    monkeypatch.setattr(Scripted, "text", HOSTILE)
    monkeypatch.setattr(pedgpt.serving.server, "StreamDecoder", Scripted)
    page = open_page(server.url)
    page.ask("<img src=x onerror='window.hurt = 1'>")
    page.finished()
    assert page.run("return window.hurt") is None
    assert page.run("return document.querySelector('.answer').textContent").count("window.hurt = 1") >= 3
    kinds = page.run("return [...document.querySelectorAll('.answer *')].map((one) => one.tagName)")
    assert {"STRONG", "CODE", "LI", "PRE", "TABLE", "TD"} <= set(kinds) and not {"SCRIPT", "IMG", "A", "B"} & set(kinds)


def test_reasoning_is_folded(server, open_page, monkeypatch):
    monkeypatch.setattr(Scripted, "text", "<think>先看年龄。\n再看体温。</think>\n\n请测体温。")
    monkeypatch.setattr(pedgpt.serving.server, "StreamDecoder", Scripted)
    page = open_page(server.url)
    page.ask("发烧")
    page.finished()
    assert page.run("return [current.turns[0].answers[0].reasoning, current.turns[0].answers[0].content]") == [
        "先看年龄。\n再看体温。", "请测体温。",
    ]  # fmt: skip
    assert page.run("return document.querySelector('details').open") is False


def test_it_fits_a_phone_and_speaks_english(server, open_page):
    page = open_page(server.url, size=(390, 800))
    page.ask("感冒" * 40)
    page.finished()
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert page.run("return document.getElementById('side').getBoundingClientRect().right <= 0")
    page.click("menu")
    page.until("return document.getElementById('side').getBoundingClientRect().left >= 0")
    page.click("language")
    assert "no substitute for a doctor" in page.run("return document.getElementById('warning').textContent")


def test_the_page_asks_for_the_key(models, chat, open_page):
    with Running(Scheduler(models, **SIZES), chat, key="secret") as running:
        page = open_page(running.url, key="secret")
        page.ask("感冒")
        page.finished()
        assert page.answers()[0][0][1]
