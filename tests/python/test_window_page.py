"""The chat window's page in Chromium, against the real server and the built-in model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest
from windowed import CHROMIUM, NO_CHROMIUM, browser, started, window_served

from mixkvq.study import tasks

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
PROBLEM = "Compute 48291 * 73."
LONG = tasks.make("sort", Random(3), len(tasks.LEVELS) - 1).prompt  # seconds of writing, on a machine that does nothing else, too
RICH = """## A heading

Text with *emphasis*, `code`, <script>window.hacked = 1</script>, [a link](https://example.org), [a bad one](javascript:alert(1)) and \\(x^2\\).

$$\\int_0^1 x\\,dx = \\frac12$$

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return "text"  # a comment
```

![an image](https://example.org/x.png) <img src=x onerror="window.hacked = 1">

مرحبا بالعالم

你好，世界
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with window_served(tmp_path_factory.mktemp("window") / "chats.db") as (window, address), browser() as chromium:
        yield window, address, chromium


@pytest.fixture
def page(served):
    """A window without a chat; what goes wrong in it fails the test."""
    _, address, chromium = served
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(60000)
    wrong = []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    opened(page, address)
    yield page
    context.close()
    # the image that may not be loaded, and a setting that is none
    assert [w for w in wrong if "example.org" not in w and "status of 400" not in w] == []


def opened(page, address, chat=None):
    page.goto("about:blank")
    page.goto(f"{address}/#{chat or ''}")
    page.wait_for_selector("#input:focus")


def say(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def kept(window, *messages, **chat):
    """A chat in the store, of texts in turn."""
    number, at = window.store.create(**{"title": "Kept", **chat}), None
    for i, message in enumerate(messages):
        more = message if isinstance(message, dict) else {"content": message}
        at = window.store.add(number, at, "assistant" if i % 2 else "user", **more)
    return number


def test_an_answer_streams_stops_and_branches(page, served):
    window, _, _ = served
    page.get_by_role("button", name="New chat").first.click()
    say(page, PROBLEM)
    page.wait_for_selector("li.assistant[data-state=running] .block")
    page.wait_for_selector("li.assistant[data-state=done]")
    (chat,) = [c for c in window.store.chats() if c.title == PROBLEM]
    first = window.store.branch(chat.id)[-1]
    assert page.inner_text("li.assistant .speed").startswith(f"{first.figures['tokens']} tokens, ")
    assert "".join(page.inner_text("li.assistant .body").split()) == "".join(first.content.replace("*", "").replace("#", "").split())
    assert page.get_by_role("list").get_by_text(PROBLEM).first.is_visible() and page.title().startswith(PROBLEM)

    page.get_by_role("button", name="Answer again").click()
    page.wait_for_selector("li.assistant[data-state=running] .block")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("li.assistant[data-state=stopped]")
    assert "Stopped." in page.inner_text("li.assistant .body") and "2 of 2" in page.inner_text("li.assistant .tools")
    page.get_by_role("button", name="Previous version").click()
    page.wait_for_selector("li.assistant[data-state=done]")
    assert "1 of 2" in page.inner_text("li.assistant .tools")

    page.locator("li.user").get_by_role("button", name="Edit").click()
    page.get_by_label("Edit", exact=True).fill("Compute 2 + 3.")
    page.locator("li.user").get_by_role("button", name="Send").click()
    page.wait_for_selector("li.user .tools :text('2 of 2')")
    page.wait_for_selector("li.assistant[data-state=done]")
    assert [m.content for m in window.store.branch(chat.id)][0] == "Compute 2 + 3."
    page.reload()
    page.wait_for_selector("li.user .block:has-text('Compute 2 + 3.')")  # the same chat and branch
    assert page.locator("li.user").count() == 1


def test_a_window_that_is_opened_while_an_answer_runs_hears_all_of_it(page, served):
    window, _, _ = served
    say(page, PROBLEM)
    page.wait_for_selector("li.assistant[data-state=running] .block")
    page.reload()
    page.wait_for_selector("li.assistant[data-state=done]")
    (answer,) = [m for m in window.store.messages(int(page.url.split("#")[1])) if m.role == "assistant"]
    assert "".join(page.inner_text("li.assistant .body").split()) == "".join(answer.content.replace("*", "").replace("#", "").split())


def test_escape_stops_and_shift_enter_begins_a_line(page):
    first, _, rest = LONG.partition(" ")
    page.keyboard.insert_text(first)
    page.keyboard.press("Shift+Enter")
    page.keyboard.insert_text(rest)
    assert page.input_value("#input") == f"{first}\n{rest}"
    page.keyboard.press("Enter")
    page.wait_for_selector("li.assistant[data-state=running] .block")
    page.keyboard.press("Escape")
    page.wait_for_selector("li.assistant[data-state=stopped]")


def test_markdown(page, served):
    window, address, _ = served
    opened(page, address, kept(window, "Show all", RICH))
    page.wait_for_selector("li.assistant .code")
    found = page.evaluate(
        """() => {
          const body = document.querySelector("li.assistant .body");
          const links = [...body.querySelectorAll("a")].map((a) => [a.textContent, a.getAttribute("href"), a.rel]);
          const dangers = body.querySelectorAll("script, [onerror], form, style").length;
          return {hacked: window.hacked, links, dangers, html: body.innerHTML, maths: body.querySelectorAll("math").length,
            cells: body.querySelectorAll("td").length, words: [...body.querySelectorAll(".hljs-keyword")].map((e) => e.textContent),
            rtl: getComputedStyle([...body.querySelectorAll("p")].find((p) => p.textContent.includes("مرحبا"))).direction};
        }"""
    )
    assert found["hacked"] is None and found["maths"] == 2 and found["cells"] == 2 and found["words"] == ["def", "return"]
    assert found["links"] == [["a link", "https://example.org", "noopener noreferrer"]]
    assert found["dangers"] == 0 and "&lt;script&gt;" in found["html"]
    page.locator(".code").get_by_role("button", name="Copy").click()
    page.wait_for_selector(".code :text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n    return "text"  # a comment\n'


def test_kill_9_and_come_back(served, tmp_path):
    _, _, chromium = served
    with started(tmp_path) as start:
        process, _, address = start()
        context = chromium.new_context()
        page = context.new_page()
        page.set_default_timeout(60000)
        page.goto(address)
        page.wait_for_selector("#input:focus")
        say(page, LONG)
        page.wait_for_selector("li.assistant[data-state=running] .block")
        page.wait_for_timeout(700)  # it is stored within a fraction of a second
        before = page.inner_text("li.assistant .block")[:20]
        process.kill()
        process.wait()
        page.wait_for_selector("#notes :text('The server does not answer.')")
        _, _, address = start()
        page.goto(address)
        page.wait_for_selector("#input:focus")
        page.get_by_role("button", name=LONG[:20]).click()
        page.wait_for_selector("li.assistant .remark:has-text('The program ended while this was being written')")
        page.wait_for_selector("li.assistant .block")  # drawn in the next frame
        assert page.inner_text("li.assistant .block").startswith(before)
        page.get_by_role("button", name="Answer again").click()
        page.wait_for_selector("li.assistant[data-state=running] .block")
        context.close()


@pytest.mark.skipif(importlib.util.find_spec("webview") is not None, reason="pywebview is there, so Chromium is not asked")
def test_the_command_opens_a_window_and_ends_with_it(tmp_path):
    """By a program `chromium` that shows what a real one has loaded, without a display, and ends."""
    program = tmp_path / "bin" / "chromium"
    program.parent.mkdir()
    look = "--headless=new --no-sandbox --virtual-time-budget=10000 --dump-dom"
    program.write_text(f"""#!/bin/sh
echo "$@" > {tmp_path}/words
exec {CHROMIUM} {look} --user-data-dir={tmp_path}/profile "${{1#--app=}}" > {tmp_path}/page
""")
    program.chmod(0o755)
    environment = {**os.environ, "DISPLAY": ":none", "XDG_DATA_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "MIXKVQ_CONFIG": ""}
    environment["PATH"] = f"{program.parent}:{environment['PATH']}"
    words = [sys.executable, "-m", "mixkvq", "chat", "-t", "1", "-np", "1", "-c", "512", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0 and "Ctrl-C ends it" in done.stderr, done.stderr
    said = (tmp_path / "words").read_text()
    assert said.startswith("--app=file://") and "key" not in said
    page = (tmp_path / "page").read_text()
    assert "<h1" in page and "<title>New chat · cot-tiny-34m-q8_0</title>" in page
    assert not Path(urlsplit(said.split()[0].removeprefix("--app=")).path).exists()  # it had the key


def test_right_to_left_text_runs_so(page, served):
    window, address, _ = served
    opened(page, address, kept(window, "مرحبا", "مرحبا بالعالم، كيف حالك؟", title="مرحبا"))
    page.wait_for_selector("li.assistant .block")
    assert page.evaluate("getComputedStyle(document.querySelector('li.assistant .block p')).direction") == "rtl"
    assert page.evaluate("getComputedStyle(document.getElementById('title')).direction") == "rtl"


def test_thinking_is_folded_with_its_time(page, served):
    window, address, _ = served
    answer = {"content": "It is 4.", "reasoning": "2 + 2 makes **4**.", "figures": {"thought_s": 2.25}}
    opened(page, address, kept(window, "2 + 2?", answer))
    details = page.locator("li.assistant details")
    assert details.locator("summary").inner_text() == "Thought for 2.3 s" and not details.locator("strong").is_visible()
    details.locator("summary").click()
    details.locator("strong").wait_for()


def test_finished_blocks_are_made_once(page):
    """What has been drawn stays: a paragraph that is finished is the same element however much text comes behind it."""
    counts = page.evaluate(
        """async () => {
          const { Growing } = await import("./markdown.js");
          const element = document.createElement("div");
          const growing = new Growing(element);
          let sanitized = 0;
          const own = window.DOMPurify.sanitize;
          window.DOMPurify.sanitize = (html, options) => {
            sanitized += html.length;
            return own.call(window.DOMPurify, html, options);
          };
          const paragraphs = Array.from({length: 400}, (_, i) => `Paragraph ${i} with some words in it.\\n\\n`).join("");
          const text = paragraphs + "```\\n# no heading\\n\\n* no list\\n```\\n\\n1. one\\n\\n2. two\\n";
          growing.add(text.slice(0, 500)); growing.draw();
          const first = element.querySelector(".block");
          for (let i = 500; i < text.length; i += 20) { growing.add(text.slice(i, i + 20)); growing.draw(); }
          growing.end(); growing.draw();
          window.DOMPurify.sanitize = own;
          return {same: first === element.querySelector(".block"), sanitized, length: text.length, text: element.textContent,
            lists: element.querySelectorAll("ol").length, code: element.querySelectorAll("pre").length,
            paragraphs: element.querySelectorAll(".block > p").length};
        }"""
    )
    assert counts["same"] and counts["paragraphs"] == 400 and counts["lists"] == counts["code"] == 1
    assert counts["sanitized"] < 8 * counts["length"]  # were all of it made anew each time: more than 400 times
    assert "Paragraph 399" in counts["text"] and "# no heading" in counts["text"]


def test_search_export_import_attach(page, served, tmp_path):
    window, address, _ = served
    number = kept(window, "Where is the zebra?", "In the savannah.", title="Animals")
    # the list of all chats comes after what is asked for later
    page.evaluate(
        """() => {
          const own = window.fetch;
          window.fetch = async (path, options) => {
            const response = await own(path, options);
            if (path === "/window/chats" && !options) await new Promise((done) => setTimeout(done, 500));
            return response;
          };
        }"""
    )
    page.get_by_role("button", name="New chat").first.click()
    page.get_by_label("Search in chats").fill("savann")
    page.wait_for_timeout(1000)
    page.get_by_role("button", name=re.compile("Animals.*savannah")).click()
    page.wait_for_selector("li.assistant :text('In the savannah.')")
    page.get_by_label("Search in chats").fill("zzzzz")
    page.wait_for_selector(":text('Nothing was found.')")
    page.get_by_label("Search in chats").fill("")

    page.get_by_role("button", name="Export").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="JSON").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name == f"chat-{number}.json" and json.loads(path.read_text())["title"] == "Animals"
    page.get_by_role("button", name="Close").click()
    page.set_input_files("#import-file", path)
    page.wait_for_url(lambda url: not url.endswith(f"#{number}"))
    page.wait_for_selector("li.assistant")
    assert len([c for c in window.store.chats() if c.title == "Animals"]) == 2

    (tmp_path / "data.txt").write_text("1 2 3")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    page.set_input_files("#attach-file", [tmp_path / "data.txt", tmp_path / "picture.png"])
    page.wait_for_selector("#notes :text('picture.png is not a text file in UTF-8.')")
    assert page.get_by_label("Attached files").inner_text() == "data.txt ×"
    say(page, "What is in it?")
    page.wait_for_selector("li.assistant:nth-of-type(4)[data-state]:not([data-state=running])")
    question = window.store.branch(int(page.url.split("#")[1]))[-2]
    assert question.files == [{"name": "data.txt", "text": "1 2 3"}] and question.content == "What is in it?"
    assert page.inner_text("li.user details summary") == "data.txt"


def test_settings_of_a_chat_and_deleting_it(page, served):
    window, _, _ = served
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Title").fill("Exact")
    page.get_by_label("System message").fill("Be exact.")
    page.get_by_label("Temperature (0: the likeliest token)").fill("0")
    page.get_by_label("Go on without the oldest messages, and say so").check()
    page.get_by_role("button", name="Save").click()
    page.wait_for_selector("h1:text('Exact')")
    (chat,) = [c for c in window.store.chats() if c.title == "Exact"]
    assert chat.system == "Be exact." and chat.settings == {"temperature": 0, "at_end": "shift"}
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top p").fill("7")
    page.get_by_role("button", name="Save").click()
    page.wait_for_selector("#notes :text('top_p must be a number from 0 to 1.')", state="attached")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_selector("h1:text('New chat')")
    assert not [c for c in window.store.chats() if c.title == "Exact"]


def test_what_the_end_of_the_context_does_is_said(page, served):
    window, address, _ = served
    number = kept(window, "word " * 1500, "Yes.", "word " * 1500, "Yes.", settings={"at_end": "shift", "max_tokens": 2})
    opened(page, address, number)
    say(page, "And now?")
    page.wait_for_selector("li.assistant[data-state=done] .remark:has-text('the model no longer reads its')")
    number = kept(window, "word " * 3000, "Yes.", settings={"max_tokens": 2})
    opened(page, address, number)
    say(page, "And now?")
    page.wait_for_selector("li.assistant[data-state=failed] .remark:has-text('tokens and the context 2048')")


def views(page, address, window):
    """Every view, one after the other; yields its name."""
    answer = {
        "content": RICH,
        "reasoning": "Let me see.",
        "figures": {"thought_s": 1.5, "tokens": 5, "predicted_n": 5, "predicted_per_second": 9.0, "prompt_n": 3},
    }
    number = kept(window, "Show all", answer, {"content": "More", "files": [{"name": "a.txt", "text": "text"}]}, {"content": "", "state": "cut"})
    window.store.add(number, window.store.branch(number)[-2].id, "assistant", "Another version", state="stopped")
    yield "empty"
    opened(page, address, number)
    page.wait_for_selector("li.assistant .code")
    yield "chat"
    page.locator("li.assistant details summary").first.click()
    page.locator("li.user .tools").last.get_by_role("button", name="Edit").click()
    yield "editing"
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cache").click()
    page.get_by_role("button", name="Layer by layer").click()
    page.wait_for_selector("#layers td")
    yield "cache"
    page.get_by_role("button", name="Cache").click()
    for name in ("Settings", "Export", "Delete"):
        page.locator("header").get_by_role("button", name=name).click()
        page.wait_for_selector("dialog[open]")
        yield name.lower()
        page.keyboard.press("Escape")
    page.get_by_label("Search in chats").fill("version")
    page.wait_for_selector("#list small")
    yield "search"
    page.get_by_label("Search in chats").fill("")
    page.evaluate("import('./parts.js').then((m) => m.note('Something failed.', true))")
    yield "note"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_any_view(page, served, theme):
    from axe_playwright_python.sync_playwright import Axe

    window, address, _ = served
    page.get_by_label("Theme").select_option(theme)
    for name in views(page, address, window):
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        found = Axe().run(page)
        assert found.violations_count == 0, f"{name}: {found.generate_report()}"


def test_everything_is_reached_with_the_keyboard(page, served):
    window, address, _ = served
    opened(page, address, kept(window, "Show all", RICH))
    page.wait_for_selector("li.assistant .code")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
    for name in (
        "To the message",
        "New chat",
        "Import",
        "search",
        "Settings",
        "Export",
        "Delete",
        "Cache",
        "Copy",
        "Edit",
        "Answer again",
        "input",
        "Attach",
        "Send",
    ):
        assert name in reached, (name, reached)
