"""The page in a real browser: every figure is drawn, it is readable on a telephone and in the dark, nothing is said."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_gr.report.page import write_page
from lightning_gr.report.run import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

# Chromium has no window as narrow as a telephone, so the page is measured in a frame. It stays as it is: the script is
# the frame's owner's, which its content policy has no say in.
OWNER = """<!DOCTYPE html><html><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
document.getElementById("page").addEventListener("load", () => {{
  const page = document.getElementById("page").contentDocument, view = page.defaultView, root = page.documentElement;
  page.querySelectorAll("details").forEach(x => x.open = {open});
  const figures = [...page.querySelectorAll("figure > svg")].map(svg => {{
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const drawn = [...svg.querySelectorAll("path, use, rect")].filter(x => {{
      const style = view.getComputedStyle(x), own = x.getBoundingClientRect();
      return own.width + own.height > 0 && /var\\(--c\\d/.test(x.getAttribute("style") || "")
        && !(style.stroke == "none" && style.fill == "none");
    }});
    const texts = [...svg.querySelectorAll("text")];
    const outside = texts.filter(x => {{
      const own = x.getBoundingClientRect();
      return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1
        || own.bottom > box.bottom + 1;
    }});
    return {{
      width: box.width, height: box.height, drawn: drawn.length, outside: outside.length,
      smallest: Math.min(...texts.map(x => parseFloat(view.getComputedStyle(x).fontSize) * scale)),
      text: view.getComputedStyle(texts[0]).fill, lines: drawn.map(x => view.getComputedStyle(x).stroke),
      ground: view.getComputedStyle(svg.closest("figure")).backgroundColor,
    }};
  }});
  const texts = [...page.querySelectorAll("body *")].filter(x => !x.closest("svg") && x.offsetParent &&
    [...x.childNodes].some(y => y.nodeType == 3 && y.textContent.trim()));
  const wide = [...page.querySelectorAll("body *")].filter(x => !x.closest(".scroll > *") && !x.closest("svg")
    && x.getBoundingClientRect().right > root.clientWidth + 1);
  document.getElementById("found").textContent = JSON.stringify({{
    figures, marks: [...page.querySelectorAll("svg.mark")].map(x => x.getBoundingClientRect().width),
    width: root.clientWidth, scroll: root.scrollWidth, wide: wide.map(x => x.outerHTML.slice(0, 99)),
    smallest: Math.min(...texts.map(x => parseFloat(view.getComputedStyle(x).fontSize))),
    texts: [...new Set(texts.map(x => view.getComputedStyle(x).color))],
    ground: view.getComputedStyle(page.body).backgroundColor,
  }});
}});
</script></body></html>"""


def browse(file: Path, *options: str) -> tuple[str, list[str]]:
    """The document after it has loaded, and what the console said."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={file.parent / 'profile'}", *options, "--dump-dom", file.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


def measure(page: Path, folder: Path, *, width: int, dark: bool = False, unfolded: bool = False) -> dict[str, Any]:
    owner = folder / "owner.html"
    settings = {"width": width, "page": html.escape(page.read_text()), "open": "true" if unfolded else "false"}
    owner.write_text(OWNER.format(**settings))
    # Blink counts dark as 0, light as 1.
    options = (f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(width, 500)},1000")
    document, console = browse(owner, *options)
    assert console == []
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', document, flags=re.DOTALL)
    return json.loads(html.unescape(found))  # type: ignore[no-any-return]


def luminance(colour: str) -> float:
    """Of the WCAG, from ``rgb(1, 2, 3)``."""
    channels = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / "a"), write_run(folder / "b", name="<b>another</b> & " + "long" * 20, lr=0.2)]
    write_page([read_run(runs[0])], folder / "one.html")
    write_page([read_run(x) for x in runs], folder / "two.html")
    return {"one": folder / "one.html", "two": folder / "two.html"}


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1200, False)])
def test_it_is_readable(pages: dict[str, Path], which: str, width: int, dark: bool, tmp_path: Path) -> None:
    found = measure(pages[which], tmp_path, width=width, dark=dark)
    assert len(found["figures"]) == pages[which].read_text().count("<figure")
    for figure in found["figures"]:
        assert figure["width"] > 300
        assert figure["height"] > 70
        assert figure["drawn"] > 0
        assert figure["outside"] == 0
        assert figure["smallest"] >= 9
        assert contrast(figure["text"], figure["ground"]) >= 7
        assert all(contrast(x, figure["ground"]) >= 3 for x in figure["lines"] if x != "none")
    assert found["marks"]
    assert all(20 < x < 30 for x in found["marks"])
    assert found["wide"] == []
    assert found["scroll"] <= found["width"] <= width
    assert found["smallest"] >= 12
    assert (luminance(found["ground"]) < 0.05) is dark
    assert min(contrast(x, found["ground"]) for x in found["texts"]) >= 4.5
    assert all((luminance(x) > luminance(found["ground"])) is dark for x in found["texts"])


def test_unfolded_it_is_no_wider(pages: dict[str, Path], tmp_path: Path) -> None:
    found = measure(pages["two"], tmp_path, width=400, unfolded=True)
    assert found["scroll"] <= found["width"]
    assert found["wide"] == []


@pytest.mark.parametrize("which", ["one", "two"])
def test_the_browser_has_nothing_to_say(pages: dict[str, Path], which: str) -> None:
    document, console = browse(pages[which])
    assert console == []
    assert "<script" not in document
    assert document.count("<figure") == pages[which].read_text().count("<figure")


def test_an_error_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<!DOCTYPE html><script>console.error('here')</script><p>text")
    assert "here" in browse(tmp_path / "bad.html")[1][0]
