"""The labelling page in a real browser: keys, undo, reload, two people, a killed server, hostile texts, accessibility.

It needs Playwright (`pip install playwright axe-playwright-python`) and Chromium (Debian: `apt install chromium`);
where one is missing, these tests are skipped with a notice.
"""

import importlib
import os
import shutil
import signal
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the labelling page needs lmgym[label]")
pytest.importorskip("playwright.sync_api", reason="BROWSER TESTS SKIPPED: pip install playwright")

from label_stores import PLAIN
from labelling_server import served, store_at
from test_labelling_page import server_process

from lmgym.preferences import Item, LabelStore, Rules

sync_api: Any = importlib.import_module("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="BROWSER TESTS SKIPPED: no Chromium (apt install chromium)")
HERE = Path(__file__).parent
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\"><b>bold</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, link: str, width: int = 1000, height: int = 800, scheme: str = "light") -> Any:
    """A page with cookies of its own; what goes wrong in it, or is asked of other hosts, is in `page.problems`."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda said: page.problems.append(said.text) if said.type == "error" else None)
    page.on("request", lambda sent: None if "127.0.0.1" in sent.url else page.problems.append(sent.url))
    page.goto(link)
    page.wait_for_selector("#answers button")
    return page


def press(page: Any, key: str) -> None:
    """A key, and the time until the next question is shown."""
    before = page.inner_text("#progress")
    page.keyboard.press(key)
    page.wait_for_function("before => document.querySelector('#progress').innerText !== before", arg=before)


def count(page: Any) -> int:
    """The answers of this labeller, as the page says."""
    return int(page.inner_text("#progress").split()[0])


def test_twenty_labels_by_keyboard_undo_and_reload(tmp_path: Path, browser: Any) -> None:
    with store_at(tmp_path / "labels.db", 30) as store, served(store) as (_, anna):
        page = opened(browser, anna)
        assert "token" not in page.url
        keys, expected = ["1", "a", "2", "d", "0", "s", "x", " "], []
        for number in range(20):
            key = keys[number % len(keys)]
            left = page.inner_text("#texts section:nth-child(1) div")
            press(page, key)
            side = "a" if left.startswith("good") else "b"
            other = "b" if side == "a" else "a"
            expected.append({"1": side, "a": side, "2": other, "d": other, "0": "tie", "s": "tie"}.get(key, key))
        assert count(page) == 20
        names = {"x": "neither", " ": "skip"}
        assert [label.answer for label in store.labels()] == [names.get(answer, answer) for answer in expected]
        assert all(label.client_ms and label.client_ms > 0 for label in store.labels())
        press(page, "u")
        assert count(page) == 19
        assert page.inner_text("#status").startswith("Taken back")
        shown = page.inner_text("#texts")
        page.reload()
        page.wait_for_selector("#answers button")
        assert (count(page), page.inner_text("#texts")) == (19, shown)
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("1")
        assert count(page) == 19, "a key does nothing behind the help"
        page.keyboard.press("Escape")
        press(page, "1")
        assert (count(page), len(store.labels())) == (20, 20)
        assert page.problems == []


def test_texts_are_never_markup(tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.labelling.app.FRESH", 0.0)
    with store_at(tmp_path / "labels.db") as store:
        store.add_items([Item(HOSTILE, (HOSTILE, "שלום ‮ 👩‍👩‍👧 \x07")), Item(HOSTILE + "!", (HOSTILE, "b"))])
        store.set_guidelines(HOSTILE)
        with served(store, names=("anna", "<i>ben</i>")) as (owner, _, ben):
            page = opened(browser, ben)
            assert page.inner_text("#prompt").startswith("<script>")
            assert HOSTILE in page.inner_text("#texts")
            assert page.inner_text("#guideline-text") == HOSTILE
            assert page.inner_text("#name") == "<i>ben</i>"
            press(page, "1")
            seen = opened(browser, owner)
            seen.wait_for_selector("#labellers td")
            assert "<i>ben</i>" in seen.inner_text("#labellers")
            for one in (page, seen):
                assert one.title() == "Which text is better?"
                assert one.locator("#question img, #question b, #question script").count() == 0
                assert one.problems == []


def test_ranking_strength_writing_and_practice(tmp_path: Path, browser: Any) -> None:
    with store_at(tmp_path / "labels.db") as store:
        store.add_items([Item("practice", ("yes", "no"), purpose="calibration", best=0, explanation="Because.")])
        with served(store, Rules(strength=True)) as (_, anna):
            page = opened(browser, anna)
            page.keyboard.press("1" if page.inner_text("#texts section div").startswith("yes") else "2")
            page.keyboard.press("3")
            page.wait_for_selector("text=Continue")
            assert page.inner_text("#status") == "Right. Because."
            page.keyboard.press("Enter")
            page.wait_for_selector("text=All done")
        store.add_items([Item("rank", ("x", "y", "z"))])
        with served(store) as (_, anna):
            page = opened(browser, anna)
            shown = [page.inner_text(f"#texts section:nth-child({i}) div") for i in (1, 2, 3)]
            page.keyboard.press("3")
            page.keyboard.press("u")
            page.keyboard.press("2")
            page.keyboard.press("3")
            page.wait_for_selector("text=All done")
            label = store.labels()[-1]
            assert [store.item(label.item).texts[i] for i in label.ranking] == [shown[1], shown[2], shown[0]]
            assert store.labels()[0].strength == 3
        store.add_items([Item("write", purpose="write")])
        with served(store) as (_, anna):
            page = opened(browser, anna)
            page.keyboard.type("1 of my own ? x")
            page.keyboard.press("Control+Enter")
            page.wait_for_selector("text=All done")
            assert store.labels()[-1].text == "1 of my own ? x"
            assert page.problems == []


def test_two_people_never_see_the_same_question(tmp_path: Path, browser: Any) -> None:
    with store_at(tmp_path / "labels.db", 12) as store, served(store, names=("anna", "ben")) as (_, *both):
        pages = [opened(browser, link) for link in both]
        for _ in range(5):
            assert pages[0].inner_text("#prompt") != pages[1].inner_text("#prompt")
            for page in pages:
                press(page, "1")
        assert len({label.item for label in store.labels()}) == len(store.labels()) == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the server that is killed is forked")
def test_a_killed_server_loses_nothing_and_the_page_goes_on(tmp_path: Path, browser: Any) -> None:
    store = store_at(tmp_path / "labels.db", 20)
    token = store.token(store.labeller("anna"))
    with server_process(store) as (start, port):
        child = start()
        page = _when_up(browser, f"http://127.0.0.1:{port}/?token={token}")
        for _ in range(3):
            press(page, "1")
        os.kill(child, signal.SIGKILL)
        page.keyboard.press("1")
        page.wait_for_selector("text=The server does not answer. Your answer is sent again until it is saved.")
        child = start()
        page.wait_for_function("() => document.querySelector('#progress').innerText.startsWith('4 ')", timeout=15000)
        assert page.inner_text("#problem") == ""
        press(page, "2")
    with LabelStore(tmp_path / "labels.db") as found:
        assert len(found.labels()) == 5


def _when_up(browser: Any, link: str) -> Any:
    for _ in range(50):
        try:
            return opened(browser, link)
        except sync_api.Error:
            threading.Event().wait(0.1)
    raise AssertionError("the server did not start")


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (320, "dark"), (1000, "light"), (1000, "dark")])
def test_small_dark_and_accessible(tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    """Nothing is wider than the window, and axe-core has no serious finding."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="AXE SKIPPED: axe-playwright-python")
    with store_at(tmp_path / "labels.db", 8) as store:
        store.add_items([Item("p", ("x", "y", "z", "w"), [{"role": "user", "content": "W" * 300}])])
        store.set_guidelines("Choose the kinder text.")
        with served(store, PLAIN) as (owner, _):
            page = opened(browser, owner, width, 640, scheme)
            kinds = set()
            while page.locator("#question").is_visible() and len(kinds) < 2:
                kinds.add(page.get_attribute("#answers", "class"))
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                found = axe.Axe().run(page).response["violations"]
                assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
                if folder := os.environ.get("LMGYM_SCREENSHOTS"):
                    page.screenshot(path=f"{folder}/label-{width}-{scheme}-{len(kinds)}.png")
                press(page, "0")
            assert kinds == {"pair", "rank"}
            assert page.problems == []


@pytest.mark.slow
def test_the_next_question_is_painted_at_once(tmp_path: Path, browser: Any) -> None:
    """From the key to the frame after the next question: a median below 50 ms."""
    with store_at(tmp_path / "labels.db", 60) as store, served(store) as (_, anna):
        page = opened(browser, anna)
        page.evaluate(
            """() => {
                window.times = []; let pressed = 0;
                document.addEventListener('keydown', () => { pressed = performance.now(); }, true);
                new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => {
                    window.times.push(performance.now() - pressed); }))).observe(
                    document.querySelector('#prompt'), {childList: true});
            }"""
        )
        for number in range(50):
            press(page, "12"[number % 2])
        page.wait_for_function("() => window.times.length >= 50")
        times = page.evaluate("window.times")
        print(f"median {statistics.median(times):.0f} ms, slowest {max(times):.0f} ms")
        assert statistics.median(times) < 50
        assert count(page) == 50, "one key per answer"
