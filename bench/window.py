"""The chat window in Chromium: pictures for docs/chat.md, and how long its frames take while a very long answer comes.

python bench/window.py pictures          # writes docs/images/chat-*.png
python bench/window.py frames            # prints them
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "python")]
from windowed import CHROMIUM, NO_CHROMIUM, browser  # noqa: E402

EXAMPLE = """The area under $x^2$ from 0 to 1:

$$\\int_0^1 x^2\\,dx = \\left[\\tfrac{x^3}{3}\\right]_0^1 = \\frac{1}{3}$$

A sum of 1000 rectangles comes close:

```python
n = 1000
print(sum((i / n) ** 2 for i in range(n)) / n)  # 0.3328335
```

| rectangles | sum |
|---:|---:|
| 10 | 0.285 |
| 1000 | 0.3328335 |
"""
FRAMES = """async ([tokens, slice]) => {
  const { Growing } = await import("./markdown.js");
  const list = document.getElementById("log");
  const item = document.createElement("li"), inner = document.createElement("div");
  list.append(item); item.append(inner); inner.dir = "auto";
  const growing = new Growing(inner), scroll = document.getElementById("scroll"), took = [], drawn = growing.draw;
  growing.draw = function () {
    const began = performance.now();
    drawn.call(growing);
    scroll.scrollTop = scroll.scrollHeight;
    took.push(performance.now() - began);
  };
  const words = ["The ", "product ", "of ", "both ", "is ", "$x^2$", ", ", "so ", "`f(x)` ", "grows. "];
  for (let i = 0; i < tokens; i += slice) {
    let text = "";
    for (let j = i; j < i + slice; j++) {
      text += words[j % 10] + (j % 60 === 59 ? "\\n\\n" : "");
      if (j % 3000 === 2999) text += "```python\\nx = 1\\n```\\n\\n";
    }
    growing.add(text);
    await new Promise(requestAnimationFrame);
  }
  growing.end();
  await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
  return took;
}"""


@contextmanager
def window() -> Iterator[Any]:
    """A page of `mixkvq chat --private`, in a browser."""
    words = [sys.executable, "-m", "mixkvq", "chat", "--private", "--no-open", "-t", "1", "-np", "2", "-c", "8192", "--device", "cpu"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(line.split()[-1] for line in process.stderr if "/open?key=" in line)
            with browser() as chromium:
                page = chromium.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
                page.set_default_timeout(300_000)
                page.goto(address)
                page.wait_for_selector("#input:focus")
                yield page
        finally:
            process.terminate()


@click.group()
def main() -> None:
    """The chat window in Chromium."""
    if CHROMIUM is None:
        raise click.ClickException(NO_CHROMIUM)


@main.command()
@click.option("--folder", default=str(ROOT / "docs" / "images"), show_default=True, help="Where the pictures go.")
def pictures(folder: str) -> None:
    """Pictures of the window, with real answers of the built-in model."""
    with window() as page:
        shown = [("user", "What is the area under x² from 0 to 1?", ""), ("assistant", EXAMPLE, "The antiderivative of x² is x³/3.")]
        rows = [{"parent": i - 1 if i else None, "role": role, "content": text, "reasoning": r} for i, (role, text, r) in enumerate(shown)]
        rows[1]["figures"] = {"thought_s": 4.2}
        chat = {"format": "mixkvq-chat-tree", "version": 1, "title": "Area under a curve", "system": "", "settings": {}, "shown": 0, "messages": rows}
        page.set_input_files("#import-file", {"name": "chat.json", "mimeType": "application/json", "buffer": json.dumps(chat).encode()})
        page.wait_for_selector("li.assistant .code")
        page.screenshot(path=f"{folder}/chat-light.png")
        page.get_by_role("button", name="New chat").first.click()
        for problem in ("Compute 48291 * 73.", "Compute 9184 * 472.", "Compute 5937 * 8164.", "Compute 77031 * 592."):
            page.get_by_label("Message", exact=True).fill(problem)
            page.keyboard.press("Enter")
            page.wait_for_selector("li.assistant[data-state=running]")
            page.wait_for_selector("li.assistant[data-state=running]", state="detached")
        page.get_by_label("Theme").select_option("dark")
        page.get_by_role("button", name="Cache").click()
        page.get_by_role("button", name="Layer by layer").click()
        page.wait_for_selector("#layers td")
        page.screenshot(path=f"{folder}/chat-cache.png")
        page.get_by_role("button", name="Cache").click()
        page.get_by_role("button", name="Settings").click()
        page.screenshot(path=f"{folder}/chat-settings.png")


@main.command()
@click.option("--tokens", default=300_000, show_default=True, help="Of the answer, in pieces of --slice.")
@click.option("--piece", default=100, show_default=True, help="Tokens that come between two frames.")
def frames(tokens: int, piece: int) -> None:
    """Milliseconds that the page works for a frame while an answer grows: the first tenth of it, and the last."""
    with window() as page:
        took = page.evaluate(FRAMES, [tokens, piece])
        version = re.search(r"Chrome/(\d+)", page.evaluate("navigator.userAgent"))
    tenth = len(took) // 10
    found: dict[str, Any] = {"tokens": tokens, "piece": piece, "chromium": version[1] if version else ""}
    for name, part in (("first", took[:tenth]), ("last", took[-tenth:])):
        found[name] = {"median_ms": round(statistics.median(part), 2), "p99_ms": round(sorted(part)[int(0.99 * len(part))], 2)}
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
