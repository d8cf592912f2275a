"""The Space in a real browser: examples, uploads, answers, errors, the keyboard, and a narrow screen.

`make test-space` installs Gradio and Playwright and runs this file. The browser is Chromium as Debian has it
(`apt-get install chromium`); nothing is downloaded.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="Gradio is not installed; make test-space installs it and runs this file")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; see make test-space")
expect = sync_api.expect

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "examples" / "images"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60  # most for a step, on a busy machine
EXAMPLES = {"Two names, 4 images": "finap", "Five names, 10 images": "kuko", "Two names, 16 images": "boflo"}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The Space as `make space` starts it, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "examples/space/app.py", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout is not None
    said: list[str] = []
    try:
        for line in server.stdout:
            said.append(line)
            if f"127.0.0.1:{port}" in line:
                break
        else:
            raise AssertionError("The Space did not start: " + "".join(said)[-2000:])
        threading.Thread(target=server.stdout.read, daemon=True).start()  # so that it can go on writing
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    yield from opened(browser, address, 1200, 900)


@pytest.fixture
def narrow(browser: Any, address: str) -> Iterator[Any]:
    yield from opened(browser, address, 360, 740)


def opened(browser: Any, address: str, width: int, height: int) -> Iterator[Any]:
    """The page, ready, for a new visitor; at the end its scripts have thrown nothing."""
    page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
    page.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    thrown: list[str] = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    page.goto(address)
    expect(page.locator("#backbone-line")).to_contain_text("aim-tiny · llava · 5 layers · no projector")
    yield page
    page.close()
    assert not thrown


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def answer(page: Any, method: str) -> Any:
    return page.locator(f"[data-method={method}]")


def upload(page: Any, place: str, *paths: Path) -> None:
    page.locator(f"{place} input[type=file]").set_input_files([str(path) for path in paths])


def error(page: Any) -> str:
    """The sentence of the error that is shown; it is closed."""
    shown = page.get_by_test_id("toast-body")
    text = shown.get_by_test_id("toast-text").inner_text()
    shown.get_by_test_id("toast-close").click()
    expect(shown).to_have_count(0)
    assert "\n" not in text and text.endswith(".") and "Traceback" not in text
    return text


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_answered_with_one_click(name: str, page: Any) -> None:
    button(page, name).click()
    expect(answer(page, "aim")).to_contain_text(f"this is {EXAMPLES[name]}")
    expect(answer(page, "aim")).to_contain_text("✓ right")
    expect(answer(page, "full")).to_contain_text("✓ right")
    expect(answer(page, "zero")).to_contain_text("✗ wrong")
    tokens = {
        one: int(re.sub(r"\D", "", answer(page, one).locator("b").first.inner_text())) for one in ("full", "aim")
    }
    assert tokens["full"] > 3 * tokens["aim"]
    for one in ("zero", "text", "full", "aim"):
        expect(answer(page, one).locator(".cost")).to_have_text(re.compile(r"[\d,]+ tokens \d+ ms"))


def test_uploaded_images_are_labelled_changed_asked_and_read_once(page: Any) -> None:
    upload(page, "#images", *(IMAGES / f"{name}-{i}.png" for name in ("fibra", "gacre") for i in (1, 2)))
    expect(page.get_by_text("4 demonstrations of 2 labels")).to_be_visible()  # labels are the files' names
    upload(page, "#query", IMAGES / "query.png")
    expect(page.locator("#query img")).to_be_visible()
    button(page, "Ask").click()
    expect(answer(page, "aim")).to_contain_text("this is gacre")
    expect(page.get_by_text("AIM read 4 demonstrations in")).to_be_visible()
    button(page, "Ask").click()
    expect(page.get_by_text("4 demonstrations had been read before")).to_be_visible()

    for number in (2, 3):  # another name for the same images
        page.locator("#demonstrations button.thumbnail-item").nth(number).click()
        expect(page.get_by_label(f"Label of number {number + 1}")).to_have_value("gacre")
        page.get_by_label(f"Label of number {number + 1}").fill("wug")
        button(page, "Change").click()
        expect(button(page, "Change")).to_be_hidden()
    button(page, "Ask").click()
    expect(answer(page, "aim")).to_contain_text("this is wug")

    page.locator("#demonstrations button.thumbnail-item").nth(0).click()
    button(page, "Remove").click()
    expect(page.get_by_text("3 demonstrations of 2 labels")).to_be_visible()
    page.get_by_label("Label of new images").fill("fibra")
    upload(page, "#images", IMAGES / "fibra-1.png")
    expect(page.get_by_text("4 demonstrations of 2 labels")).to_be_visible()


def test_errors_are_a_sentence_and_leave_a_way_on(page: Any, tmp_path: Path) -> None:
    button(page, "Ask").click()
    assert error(page).startswith("There is no image to ask about")
    (tmp_path / "notes.png").write_text("not an image")
    upload(page, "#images", tmp_path / "notes.png")
    assert error(page) == "notes.png is not an image, or is damaged: give a PNG, JPEG or WebP file."
    upload(page, "#query", tmp_path / "notes.png")
    assert error(page).startswith("notes.png is not an image")
    expect(page.locator("#query input[type=file]")).to_be_attached()  # empty again
    page.get_by_role("tab", name="Bank").click()
    button(page, "Save the demonstrations as a bank").click()
    assert error(page) == "There is nothing to save: add demonstrations first."
    page.get_by_role("tab", name="Depth").click()
    button(page, "Compare depths on these demonstrations").click()
    assert error(page).startswith("At least two images of a label are needed")
    page.get_by_role("tab", name="Backbone").click()
    for name in ("examples/images", "<b>../etc</b>"):
        page.locator("#backbone input, #backbone textarea").fill(name)
        button(page, "Load").click()
        assert error(page).startswith(f"'{name}' is not a Hub id")
    page.locator("#backbone input, #backbone textarea").fill("nobody/nothing")
    button(page, "Load").click()
    assert error(page) == "nobody/nothing cannot be loaded: the Hub cannot be reached from here."
    button(page, "Two names, 4 images").click()
    expect(answer(page, "aim")).to_contain_text("✓ right")


def test_everything_is_reached_by_the_keyboard(page: Any) -> None:
    def tab_to(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                "[document.activeElement.innerText, document.activeElement.getAttribute('aria-label'),"
                " document.activeElement.labels?.[0]?.innerText].filter(Boolean).join(' ')"
            )
            if name in focused:
                return
        raise AssertionError(f"Tab does not reach {name}")

    tab_to("Two names, 4 images")
    page.keyboard.press("Enter")
    expect(answer(page, "aim")).to_contain_text("✓ right")
    tab_to("Question")
    page.keyboard.press("Enter")  # asks
    expect(page.get_by_text("4 demonstrations had been read before")).to_be_visible()
    tab_to("Ask")
    ring = page.evaluate("(s => s.outlineStyle + s.boxShadow)(getComputedStyle(document.activeElement))")
    assert ring != "nonenone"
    tab_to("Depth")
    page.keyboard.press("Enter")
    expect(button(page, "Compare depths on these demonstrations")).to_be_visible()


def test_a_narrow_screen_shows_everything_without_scrolling_sideways(narrow: Any) -> None:
    button(narrow, "Five names, 10 images").click()
    expect(answer(narrow, "aim")).to_contain_text("✓ right")
    for tab in ("Backbone", "Bank", "Depth"):
        narrow.get_by_role("tab", name=tab).click()
        assert narrow.evaluate("document.documentElement.scrollWidth") <= 360
    for one in narrow.get_by_role("button").all():
        box = one.bounding_box() if one.is_visible() else None
        assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 360), one.inner_text()


def test_a_bank_is_saved_loaded_and_asked_without_reading(page: Any, tmp_path: Path) -> None:
    button(page, "Two names, 4 images").click()
    expect(answer(page, "aim")).to_contain_text("✓ right")
    page.get_by_role("tab", name="Bank").click()
    button(page, "Save the demonstrations as a bank").click()
    with page.expect_download() as download:
        page.locator("#bank-download").click()
    download.value.save_as(tmp_path / "aim-bank.zip")
    button(page, "Clear demonstrations").click()
    expect(page.get_by_text("No demonstrations yet.")).to_be_visible()
    upload(page, "#bank", tmp_path / "aim-bank.zip")
    expect(page.get_by_text("4 demonstrations of 2 labels")).to_be_visible()
    button(page, "Ask").click()
    expect(answer(page, "full")).to_contain_text("A bank keeps no full images")
    expect(answer(page, "aim")).to_contain_text("this is finap")
    expect(page.get_by_text("4 demonstrations had been read before")).to_be_visible()
    page.get_by_role("tab", name="Backbone").click()
    page.get_by_label("with its projector").click()
    button(page, "Load").click()
    expect(page.locator("#backbone-line")).to_contain_text("projector residual_mlp")
    button(page, "Ask").click()
    assert "comes from a bank that another backbone or depth has read" in error(page)


def test_the_depths_are_drawn_and_one_is_used(page: Any) -> None:
    button(page, "Two names, 16 images").click()
    expect(answer(page, "aim")).to_contain_text("✓ right")
    page.get_by_role("tab", name="Depth").click()
    button(page, "Compare depths on these demonstrations").click()
    expect(page.locator("#depth-picture img")).to_be_visible()
    expect(page.locator("#verdict")).to_contain_text("beats words only")
    use = page.get_by_role("button", name=re.compile(r"Answer at depth \d"))
    depth = use.inner_text().split()[-1]
    use.click()
    page.get_by_role("tab", name="Backbone").click()
    expect(page.locator("#backbone-line")).to_contain_text(f"enters at depth {depth}")
    button(page, "Ask").click()
    expect(answer(page, "aim")).to_contain_text("this is boflo")


def test_no_address_and_no_path_is_opened_for_a_client(address: str) -> None:
    """Whoever speaks to the server without the page cannot have it fetch an image, or open a file of the machine."""
    asked: list[str] = []

    class Images(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    def call(image: str) -> str:
        """What the server says to a question about an image."""
        with urllib.request.urlopen(f"{address}/config") as answered:
            config = json.load(answered)
        kinds = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        [ask, *_] = [
            one for one in config["dependencies"] if kinds["query"] in one["inputs"] and len(one["inputs"]) == 3
        ]
        session = uuid.uuid4().hex
        file = {"path": image, "url": image, "meta": {"_type": "gradio.FileData"}}
        data = [None if number != kinds["query"] else file for number in ask["inputs"]]
        body = {"data": data, "fn_index": ask["id"], "session_hash": session}
        headers = {"Content-Type": "application/json"}
        prefix = address + config.get("api_prefix", "")
        join = urllib.request.Request(f"{prefix}/queue/join", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(join):
            pass
        deadline = time.monotonic() + SECONDS
        with urllib.request.urlopen(f"{prefix}/queue/data?session_hash={session}") as events:
            for line in events:
                if b"process_completed" in line or time.monotonic() > deadline:
                    return line.decode()
        return ""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Images) as images:
        threading.Thread(target=images.serve_forever, daemon=True).start()
        assert "This Space downloads nothing: upload the file." in call(f"http://127.0.0.1:{images.server_port}/a.png")
        images.shutdown()
    assert not asked
    said = call(str(IMAGES / "query.png"))
    assert '"success": false' in said.replace('":false', '": false') and "this is" not in said
