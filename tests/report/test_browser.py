"""The HTML page in a real browser: no error, nothing wider than the screen, light and dark, and on paper."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from lightning_cwrf import WeightMask
from lightning_cwrf.report import write_report
from tests.auditing.recipes import run, simulated
from tests.report.cases import audited, random_audit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

# A window is at least 500 pixels wide, so the page is measured in a frame. Its own policy forbids it scripts.
MEASURED = """<!DOCTYPE html><style>:root {{ color-scheme: light dark }} iframe {{ border: 0 }}</style>
<iframe width="{width}" height="800" srcdoc="{page}"></iframe><pre id="found"></pre><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const style = name => getComputedStyle(page.querySelector(name));
  const all = [...page.querySelectorAll("body *")].filter(each => !each.closest(".scroll") && !each.closest("svg"));
  const beyond = all.filter(each => each.getBoundingClientRect().right > root.clientWidth + 1);
  const texts = [...page.querySelectorAll("p, li, td, th")];
  document.querySelector("#found").textContent = JSON.stringify({{
    screen: root.clientWidth, wide: root.scrollWidth, beyond: beyond.map(each => each.outerHTML.slice(0, 80)),
    ground: style("body").backgroundColor, text: style("body").color, quiet: style(".quiet").color,
    curve: style(".curve").stroke, headline: style(".headline").color,
    pictures: [...page.images].map(each => each.naturalWidth),
    smallest: Math.min(...texts.map(each => parseFloat(getComputedStyle(each).fontSize))),
  }});
}});
</script>"""


def chromium(*arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    done = subprocess.run([CHROMIUM, *flags, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Everything that a page can hold, with names that are long."""
    results = {
        "unprotected": random_audit(shift=2.0, attacks=["loss", "entropy", "confidence"]),
        "a_model_with_a_very_long_name_without_any_space_in_it_v1.2.3": random_audit(seed=1, attacks=["loss"]),
        "<b>third</b>": random_audit(seed=2, attacks=["loss", "entropy"], remarks=["a/very/long/path" * 10]),
    }
    mask = WeightMask({f"encoder.layers.{i}.attention.query.weight": torch.rand(8) > 0.5 for i in range(30)})
    path = tmp_path_factory.mktemp("page") / "report.html"
    more = {"title": "A-title-" * 20, "images": torch.rand(60, 3, 32, 32), "settings": {"path": "x" * 200}}
    return write_report(results, path, mask=mask, **more)


def measured(page, width, dark, folder):
    whole = folder / "measured.html"
    whole.write_text(MEASURED.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
    dom, console = chromium("--dump-dom", f"--window-size={width + 40},900", *dark, f"file://{whole}")
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)
    return json.loads(html.unescape(found[1])), console


@pytest.mark.parametrize("dark", [(), ("--force-dark-mode",)], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_has_enough_contrast(page, width, dark, tmp_path):
    found, console = measured(page, width, dark, tmp_path)
    assert console == []
    assert found["screen"] == width
    assert (found["wide"], found["beyond"]) == (width, [])
    assert found["pictures"] == [32] * 30
    assert found["smallest"] >= 13
    assert (luminance(found["ground"]) < 0.1) == bool(dark)
    for name, least in (("text", 7), ("quiet", 4.5), ("headline", 4.5), ("curve", 3)):
        assert contrast(found[name], found["ground"]) > least, name


def test_the_page_by_itself_has_no_error_and_asks_for_nothing(page):
    dom, console = chromium("--dump-dom", f"file://{page}")
    assert console == []
    assert "<h2>Verdict</h2>" in dom


def test_the_page_prints(page, tmp_path):
    target = tmp_path / "page.pdf"
    chromium("--no-pdf-header-footer", f"--print-to-pdf={target}", f"file://{page}")
    content = target.read_bytes()
    assert content[:5] == b"%PDF-"
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20


def test_the_page_of_one_audit_fits_a_phone(tmp_path):
    path = write_report(audited(), tmp_path / "one.html")
    found, console = measured(path, 360, (), tmp_path)
    assert (found["wide"], found["beyond"], console) == (360, [], [])


def test_the_page_of_recipes_fits_a_phone(tmp_path):
    recipes = {"leaky": run(simulated(leak=3.0)), "<b>safe</b>": run(simulated())}
    path = write_report(recipes, tmp_path / "recipes.html")
    found, console = measured(path, 360, (), tmp_path)
    assert (found["wide"], found["beyond"], console) == (360, [], [])


def luminance(colour):
    """The relative luminance of WCAG 2."""
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
