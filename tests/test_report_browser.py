"""The report in a real browser, headless: wide and on a telephone, light and dark, under a pointer.

Debian's package chromium serves; without a browser these tests are left out.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import DISCRIMINATOR, tiny_config

from vqgan_accel.report import report
from vqgan_accel.training.loop import train

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# what would reach for a network is off; no sandbox, for in a container there may be no namespaces to make it of
OPTIONS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
OPTIONS += "--disable-component-update --disable-sync --hide-scrollbars"
WIDE, TELEPHONE = (1280, 900), (390, 844)
PREFERENCE = {"light": 1, "dark": 0}
MEASURE = """
<script>
window.faults = [];
addEventListener("error", event => faults.push(event.message));
addEventListener("securitypolicyviolation", event => faults.push(event.violatedDirective));
addEventListener("load", () => {
  const chart = [...document.querySelectorAll(".chart")].find(card => card.textContent.includes("Logits")),
        svg = chart.querySelector("svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 1, clientY: box.top + 9}));
  const style = name => getComputedStyle(document.body).getPropertyValue(name);
  const under = [...chart.querySelectorAll(".legend b")].map(place => place.textContent);
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  const measured = {
    faults, under, width: innerWidth, page: document.documentElement.scrollWidth, back: style("background-color"),
    after: chart.querySelector(".legend b").textContent, data: JSON.parse(chart.querySelector("script").textContent),
    charts: [...document.querySelectorAll(".chart svg")].map(svg => Math.round(svg.getBoundingClientRect().width)),
    letters: Math.min(...[...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)),
    pictures: [...document.images].map(image => image.naturalWidth),
  };
  parent.postMessage(measured, "*");
});
</script>
"""
# a browser opens no window that is as narrow as a telephone, so the page is looked at in a frame
FRAME = """
<!doctype html>
<meta name="color-scheme" content="light dark">
<body style="margin: 0"><iframe src="measuring.html" width="{}" height="{}" style="border: 0"></iframe>
<script>
addEventListener("message", event => {{
  document.body.innerHTML = "<pre id=measured></pre>";
  document.getElementById("measured").textContent = JSON.stringify(event.data);
}});
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of two runs, of which one has a long name."""
    folder = tmp_path_factory.mktemp("browser")
    settings: dict[str, Any] = {"discriminator": DISCRIMINATOR, "training": {"max_steps": 3, "log_every": 1}}
    runs = []
    for seed, name in enumerate(("first", "a_second_run_with_a_name_that_is_too_long_for_any_telephone_to_show")):
        runs.append(train(tiny_config(folder, output_dir=str(folder / name), seed=seed, **settings)))
    yield report(runs, folder / "report.html")


def browse(page: Path, size: tuple[int, int], colours: str, profile: Path, *arguments: str) -> str:
    """The browser's stdout."""
    assert BROWSER is not None
    command = [BROWSER, *OPTIONS.split(), f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
    command += [f"--blink-settings=preferredColorScheme={PREFERENCE[colours]}", *arguments, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("colours", PREFERENCE)
@pytest.mark.parametrize("size", [WIDE, TELEPHONE])
def test_the_page_fits_the_screen_in_both_colours_and_tells_values_under_the_pointer(page, tmp_path, size, colours):
    measuring = tmp_path / "measuring.html"
    measuring.write_text(page.read_text().replace("<title>", MEASURE + "<title>", 1))
    (tmp_path / "frame.html").write_text(FRAME.format(*size))
    shown = browse(tmp_path / "frame.html", WIDE, colours, tmp_path / "profile", "--dump-dom")
    (found,) = re.findall(r'<pre id="measured">(.*?)</pre>', shown)
    measured = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert measured["faults"] == []
    assert measured["width"] == size[0] and measured["page"] <= size[0]  # nothing sticks out
    columns = 3 if size == WIDE else 1
    assert all(300 <= width <= size[0] / columns for width in measured["charts"]) and len(measured["charts"]) > 12
    assert measured["letters"] >= 9  # pixels
    assert measured["pictures"] == [16] * 2 * 3
    back = [int(part) for part in re.findall(r"\d+", measured["back"])[:3]]
    assert min(back) > 240 if colours == "light" else max(back) < 40
    assert [float(word.split(" ")[0]) for word in measured["under"]] == pytest.approx(
        [curve["y"][-1] for curve in measured["data"]], rel=1e-4
    )
    assert measured["under"][0].endswith(" at 3") and measured["after"] == ""


@pytest.mark.parametrize("colours", PREFERENCE)
def test_what_is_seen_has_the_colours_that_were_asked_for(page, tmp_path, colours):
    browse(page, WIDE, colours, tmp_path / "profile", f"--screenshot={tmp_path / 'seen.png'}")
    with Image.open(tmp_path / "seen.png") as picture:
        seen = picture.convert("RGB")
    assert seen.size == WIDE
    corner = seen.getpixel((2, WIDE[1] - 2))
    assert isinstance(corner, tuple)
    assert min(corner) > 240 if colours == "light" else max(corner) < 40
    assert len(seen.getcolors(10**6) or []) > 100  # letters, curves, pictures
