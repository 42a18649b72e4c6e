"""Doctors' pages in a real browser: votes by mouse and keyboard, reloads, a crash, export, import, and the merge."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pedgpt.data import Message
from pedgpt.evaluation.responses import Answers, Question, write_answers

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, which drives the browser, is not installed")
By, Keys = (pytest.importorskip(f"selenium.webdriver.common.{name}") for name in ("by", "keys"))
By, Keys = By.By, Keys.Keys
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
DIMENSIONS = ("professionalism", "factuality", "safety", "overall")
SYSTEMS = ("quartz_run", "opal_run")
HOSTILE = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'><b>粗体</b> & <!-- 无 -->"


def browser(profile):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver (Debian's chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


class Page:
    """A rater's page in a browser."""

    def __init__(self, driver, file, downloads, size=(1280, 900), touch=False, forget=True):
        self.driver, self.downloads = driver, downloads
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
        self.resize(size, touch)
        if forget:  # what another test left in this browser
            driver.get("about:blank")
            driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "file://", "storageTypes": "all"})
            driver.get_log("browser")
        driver.get(Path(file).as_uri())
        self.ready()
        self.data = self.run("return DATA")

    def resize(self, size, touch=False):
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1 + touch, "mobile": touch}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def ready(self):
        wait_for(lambda: self.run("return document.body.dataset.ready"))

    def reload(self):
        self.driver.refresh()
        self.ready()

    def crash(self):
        """The browser dies as by a power cut, without writing anything."""
        driver = self.driver.service.process.pid
        tasks = Path(f"/proc/{driver}/task").glob("*/children")
        (browser,) = (int(child) for file in tasks for child in file.read_text().split())
        os.kill(browser, signal.SIGKILL)
        self.driver.service.process.kill()
        wait_for(lambda: not alive(browser))

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector):
        found = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def keys(self, *keys):
        for key in keys:
            webdriver.ActionChains(self.driver).send_keys(key).perform()

    def begin(self):
        self.click("#begin")
        return self

    def pressed(self):
        """The choices on the question that is shown."""
        found = self.driver.find_elements(By.CSS_SELECTOR, '[data-dimension][aria-pressed="true"]')
        return {button.get_attribute("data-dimension"): button.get_attribute("data-choice") for button in found}

    def asked(self):
        return self.data["questions"][self.run("return state.at")]["id"]

    def progress(self):
        return self.find("#count").text

    def export(self):
        """The file that the page saves."""
        before = {*self.downloads.iterdir()}
        self.click("#open-export")
        self.click("#save")
        return wait_for(lambda: next(iter({*self.downloads.glob("*.json")} - before), None))

    def toast(self):
        return wait_for(lambda: self.find("#toast").text)

    def send_file(self, path):
        self.click("#open-export")
        self.run("get('toast').textContent = ''")
        self.find("#file").send_keys(str(path))
        told = self.toast()
        if self.run("return get('export').open"):
            self.click("#export .close")
        return told


def alive(process):
    """A process that has died may stay in the table until somebody asks for its exit code."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""
    return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    driver = browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def browse(shared, tmp_path):
    """Opens a page in the browser of all tests; with a `profile`, in a browser of its own that ends with the test."""
    opened = []

    def browse(file, profile=None, **settings):
        driver = shared
        if profile is not None:
            opened.append(driver := browser(profile))
        downloads = tmp_path / f"downloads{len(opened)}"
        downloads.mkdir(exist_ok=True)
        return Page(driver, file, downloads, forget=profile is None, **settings)

    yield browse
    shared.get("about:blank")
    for driver in opened:
        with contextlib.suppress(Exception):
            driver.quit()


@pytest.fixture
def build(lab, tmp_path):
    """The recipe's pages of six questions, and their key."""

    def build(*flags, answer="先观察精神和体温，必要时就医。", count=6):
        before = (Message("user", "医生您好。"), Message("assistant", "您好，请说。"))
        asked = [Message("user", f"孩子发热第{i}天怎么办？") for i in range(count)]
        questions = [Question((*before, message), "", "EviDiag") for message in asked]
        for place, name in enumerate(SYSTEMS):
            said = [Message("assistant", f"第{place}种：{answer}") for _ in questions]
            write_answers(tmp_path / f"{name}.jsonl", Answers(name, questions, said, {"model": name}))
        files = [str(tmp_path / f"{name}.jsonl") for name in SYSTEMS]
        output = tmp_path / "pages"
        flags = ["--raters", "li", "wang", "zhao", "--output", str(output), *flags]
        result = lab.call("doctors", ["--answers", *files, *flags])
        assert result.code == 0, result.err
        return output, json.loads((output / "key.json").read_text(encoding="utf-8"))

    return build


def plan(key, rater, question, dimension):
    """What a rater is to choose, as a system or a tie, different from question to question."""
    number, place = key["questions"][question]["number"], DIMENSIONS.index(dimension)
    return ("tie", *SYSTEMS)[(number + place * (rater != "li") + (number == 3) * (rater == "zhao")) % 3]


def letter(key, page, question, choice):
    order = key["pages"][page.data["page"]]["orders"][question]
    return "tie" if choice == "tie" else "AB"[order.index(choice)]


def vote(key, page, rater, by):
    """All four choices on the question that is shown."""
    question = page.asked()
    for dimension in DIMENSIONS:
        choice = letter(key, page, question, plan(key, rater, question, dimension))
        if by == "keys":
            page.keys({"A": "1", "B": "2", "tie": "0"}[choice])
        else:
            page.click(f'[data-dimension="{dimension}"][data-choice="{choice}"]')
    assert set(page.pressed()) == {*DIMENSIONS}


def test_three_raters_vote_export_and_are_merged(build, browse, lab, tmp_path):
    output, key = build()
    assert sorted(path.name for path in output.iterdir()) == ["key.json", "li.html", "wang.html", "zhao.html"]
    files = []
    for rater, by in (("li", "keys"), ("wang", "mouse"), ("zhao", "keys")):
        page = browse(output / f"{rater}.html").begin()
        for number in range(6):
            vote(key, page, rater, by)
            if number == 2:
                page.reload()  # in the middle, without any goodbye
                assert page.progress() == "已完成 3 / 6" and set(page.pressed()) == {*DIMENSIONS}
            if rater == "wang" and number == 3:
                unsafe = key["pages"][page.data["page"]]["orders"][page.asked()][1], page.asked()
                page.click('[data-unsafe="B"]')
                page.click("#comment")
                page.keys("没有提到“惊厥”\n12E0😀")  # no shortcuts while somebody writes
            if by == "keys":
                page.keys(Keys.ENTER)
            elif number < 5:
                page.click("#next")
        assert page.progress() == "已完成 6 / 6"
        if by == "keys":  # after the last question Enter leads to the export
            assert page.run("return get('export').open")
            page.click("#export .close")
        assert page.find("#open-export").get_attribute("class") == "main"
        files.append(page.export())
        assert files[-1].name == f"ratings_{rater}.json" and page.find("#open-export").get_attribute("class") == ""
        assert not page.driver.get_log("browser")
    results = tmp_path / "results.json"
    merging = ["--key", str(output / "key.json"), "--output", str(results), "--draws", "100"]
    result = lab.call("doctors", ["--merge", *map(str, files), *merging])
    assert result.code == 0, result.err
    assert "opal_run" in result.out and "Krippendorff" in result.out and "没有提到“惊厥”\n12E0😀" in result.out
    found = json.loads(results.read_text(encoding="utf-8"))
    assert len(found["votes"]) == 24
    numbers = {row["number"]: question for question, row in key["questions"].items()}
    for row in found["votes"]:
        expected = {r: plan(key, r, numbers[row["number"]], row["dimension"]) for r in ("li", "wang", "zhao")}
        assert row["votes"] == expected
    assert [(row["system"], row["number"], row["raters"]) for row in found["unsafe"]] == [
        (unsafe[0], key["questions"][unsafe[1]]["number"], ["wang"])
    ]
    partial = json.loads(files[0].read_text(encoding="utf-8"))
    files[0].write_text(json.dumps(partial).replace('"tie"', '"A"', 1), encoding="utf-8")
    result = lab.call("doctors", ["--merge", *map(str, files), *merging])
    assert result.code == 2 and f"{files[0]}: " in result.err and "its checksum is wrong" in result.err


def test_an_export_goes_on_in_another_browser(build, browse, tmp_path):
    output, key = build("--language", "en")
    first = browse(output / "li.html").begin()
    assert first.find("#open-export").text == "Export"
    vote(key, first, "li", "keys")
    first.click("#next")
    first.keys("1")
    file = first.export()
    content = json.loads(file.read_text(encoding="utf-8"))
    assert len(content["ratings"]) == 2 and content["finished"] == 1
    second = browse(output / "li.html", profile=tmp_path / "second").begin()
    assert second.progress() == "0 of 6 finished"
    assert second.send_file(file) == "2 questions imported." and second.progress() == "1 of 6 finished"
    second.keys("g")  # the first unfinished question, where the second aspect is next
    assert second.pressed() == {"professionalism": "A"}
    second.keys("2", "0", "0", "g")
    assert second.progress() == "2 of 6 finished" and second.run("return state.at") == 2
    assert second.send_file(file) == "1 questions imported."  # the later choice stays
    assert second.progress() == "2 of 6 finished"
    again = json.loads(second.export().read_text(encoding="utf-8"))
    assert again["ratings"].keys() == content["ratings"].keys() and again["finished"] == 2
    # What cannot be trusted, or is of another page, changes nothing.
    changed = file.with_name("changed.json")
    changed.write_text(file.read_text(encoding="utf-8").replace('"A"', '"B"', 1), encoding="utf-8")
    assert second.send_file(changed).startswith("Wrong checksum")
    changed.write_text("{]", encoding="utf-8")
    assert second.send_file(changed) == "This is not a file that this page exported."
    other = browse(output / "wang.html").begin()
    assert other.send_file(file) == "This file belongs to another page or another rater."
    assert other.progress() == "0 of 6 finished"


def test_a_crash_of_the_browser_loses_no_more_than_the_last_second(build, browse, tmp_path):
    output, key = build()
    page = browse(output / "li.html", profile=tmp_path / "kept").begin()
    vote(key, page, "li", "keys")
    page.keys("c", "备注")
    time.sleep(1)
    page.crash()
    for lock in (tmp_path / "kept").glob("Singleton*"):
        lock.unlink()
    page = browse(output / "li.html", profile=tmp_path / "kept")
    assert page.progress() == "已完成 1 / 6" and set(page.pressed()) == {*DIMENSIONS}
    assert page.find("#comment").get_property("value") == "备注"


def test_a_narrow_window_shows_everything_and_takes_taps(build, browse, tmp_path):
    output, key = build(answer="观察精神、体温和尿量。" * 60)
    page = browse(output / "li.html", size=(390, 844), touch=True).begin()
    assert page.run("return document.documentElement.scrollWidth") <= 390
    buttons = page.driver.find_elements(By.CSS_SELECTOR, "[data-choice], #next, #previous, #jumps button")
    assert len(buttons) == 12 + 2 + 3
    for button in buttons:
        box = button.rect
        assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390
    left, right = (found.rect for found in page.driver.find_elements(By.CSS_SELECTOR, ".answer"))
    assert left["x"] == right["x"] and left["y"] < right["y"]  # one below the other
    page.find("#jumps button:last-child").click()  # to the choices, without scrolling
    seen = page.run("return [get('dimensions').getBoundingClientRect(), get('nav').getBoundingClientRect()]")
    assert seen[0]["top"] >= 0 and seen[0]["bottom"] <= seen[1]["top"]
    vote(key, page, "li", "mouse")
    page.click("#next")
    assert page.progress() == "已完成 1 / 6" and page.run("return scrollY") == 0
    page.resize((320, 568), touch=True)
    assert page.run("return document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("size", [(820, 1180), (1024, 768), (1440, 900)])
def test_wider_windows_show_the_answers_side_by_side_above_the_choices(build, browse, size):
    output, _ = build(answer="观察精神、体温和尿量。" * 100)
    page = browse(output / "li.html", size=size, touch=True).begin()
    left, right = (found.rect for found in page.driver.find_elements(By.CSS_SELECTOR, ".answer"))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    dock = page.run("return get('dock').getBoundingClientRect().toJSON()")
    assert dock["bottom"] <= size[1] + 1 and dock["height"] < size[1] * 0.3  # seen while one reads
    assert page.run("return document.documentElement.scrollWidth") <= size[0]


def test_texts_of_answers_are_shown_and_never_run(build, browse):
    output, _ = build(answer=HOSTILE)
    page = browse(output / "li.html").begin()
    shown = [found.text for found in page.driver.find_elements(By.CSS_SELECTOR, ".answer .text")]
    assert sorted(shown) == [f"第0种：{HOSTILE}", f"第1种：{HOSTILE}"]
    assert page.run("return window.hurt === undefined && document.querySelectorAll('main img, main b').length === 0")
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert not page.driver.get_log("browser")
    text = page.find("body").text + page.driver.title + page.run("return document.documentElement.outerHTML")
    assert not [name for name in SYSTEMS if name in text] and "仅供研究，不能代替医生" in text


def test_keys_do_what_the_page_says(build, browse):
    output, _ = build()
    page = browse(output / "li.html").begin()
    page.keys("1", "s", "0", "w", Keys.BACKSPACE, "w", "2")  # safety is chosen and cleared again
    assert page.pressed() == {"professionalism": "A", "factuality": "B"}
    page.keys("t", "0", "2")  # safety, overall, and overall again
    assert page.pressed() == {"professionalism": "A", "factuality": "B", "safety": "tie", "overall": "B"}
    shift = webdriver.ActionChains(page.driver)
    shift.key_down(Keys.SHIFT).send_keys("2").key_up(Keys.SHIFT).perform()
    assert page.run("return ratingOf(question()).unsafe") == ["B"]
    assert page.find(".answer.unsafe .letter").text == "回答 B"
    page.keys(Keys.ARROW_RIGHT)
    assert page.run("return state.at") == 1 and page.pressed() == {}
    page.keys(Keys.ARROW_LEFT)
    assert page.run("return state.at") == 0 and len(page.pressed()) == 4
    page.keys("?")
    assert page.run("return get('help').open && document.querySelectorAll('#shortcuts tr').length") == 12
    page.keys("1", Keys.ESCAPE, "o")
    assert page.run("return get('map-dialog').open") and page.find("#map .done").text == "1"
    page.driver.find_elements(By.CSS_SELECTOR, "#map button")[4].click()
    assert page.run("return state.at") == 4
    page.keys("g")
    assert page.run("return state.at") == 1
    page.click("#switch")
    assert page.progress() == "1 of 6 finished" and page.run("return document.documentElement.lang") == "en"
    page.reload()
    assert page.progress() == "1 of 6 finished"


def test_checksums_of_the_page_are_those_of_hashlib(build, browse):
    page = browse(build()[0] / "li.html")
    lengths = (0, 1, 3, 54, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 1000)
    texts = [*("a" * length for length in lengths), "儿科😀\u2028\x00é" * 9]
    assert page.run("return arguments[0].map(sha256)", texts) == [
        hashlib.sha256(text.encode()).hexdigest() for text in texts
    ]
    value = {"b": [1, None, True, "é\n\"\\\u2028\x1f\x7f"], "a": {"z": "", "y": {}}}
    assert page.run("return canonical(arguments[0])", value) == json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )


def test_the_merge_prints_a_table(build, lab, tmp_path):
    """Without a browser: a file that says what the page would."""
    output, key = build("--per_question", "1", "--limit", "3")
    files = []
    for page, told in key["pages"].items():
        rating = dict.fromkeys(DIMENSIONS, "tie") | {"overall": "A", "unsafe": ["B"], "comment": "见\x1b[2J"}
        content = {"format": "doctors-1", "set": key["set"], "page": page, "rater": told["rater"]}
        content["ratings"] = {question: {**rating, "seconds": 5, "at": 1} for question in told["orders"]}
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
        files.append(tmp_path / f"{told['rater']}.json")
        files[-1].write_text(json.dumps(content), encoding="utf-8")
    merging = ["--key", str(output / "key.json"), "--output", str(tmp_path / "results.json"), "--draws", "50"]
    result = lab.call("doctors", ["--merge", *map(str, files[:2]), *merging])
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines()]
    assert "3 questions, raters li, wang" in result.out and "no file of zhao" in result.out
    ties = ["0.0", "[0.0,", "0.0]", "100.0", "[100.0,", "100.0]", "0.0", "[0.0,", "0.0]"]
    assert ["all", "safety", "2", *ties, "quartz_run", ":", "opal_run"] in lines
    assert ["all", "overall", "0", "–", "–", "–", "–"] in lines  # nobody shares a question
    assert "2 answers called unsafe" in result.out and "见\\x1b[2J" in result.out
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["missing_raters"] == ["zhao"]


def test_pages_that_raters_may_have_are_not_replaced(build, lab, tmp_path):
    output, _ = build()
    build()  # the same again
    with pytest.raises(AssertionError, match="is the key of other pages, which raters may have"):
        build("--seed", "1")
    key = str(output / "key.json")
    for arguments, told in (
        (["--output", str(tmp_path / "x")], "2 to 8 files of answers"),
        (["--output", "x", "--merge", "a.json"], "--key, the key.json"),
        (["--output", "x", "--merge", "a.json", "--key", key], "a.json: not a file that a page"),
        (["--output", key, "--merge", "a.json", "--key", key], "key.json: is among the files to be read"),
        (["--output", "x", "--merge", "a.json", "--key", key, "--draws", "0"], "draws must be at least 1"),
        (["--output", "x", "--language", "fr"], "language must be"),
    ):
        result = lab.call("doctors", arguments)
        assert result.code == 2 and told in result.err, result.err
