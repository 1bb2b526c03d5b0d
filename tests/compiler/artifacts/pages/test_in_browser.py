"""Pages in headless Chromium, at two widths and in both colour schemes: nothing is loaded, nothing overflows, text can be
read, and whatever reacts can be reached by keys."""

import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
from effc.compiler.artifacts.pages.page import render_html
from effc.compiler.artifacts.pages.report_data import ReportData

from tests.chromium import BROWSER, browsing
from tests.compiler.artifacts.pages.report_data import RECIPE, cut, manifest, report

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: apt-get install chromium"),
]
pytest.importorskip("vl_convert")
LEAST = 4.5  # WCAG 2.2, 1.4.3: contrast of text
KINDS = Path(__file__).parents[3] / "stored" / "kinds.tar.xz"

# Of every visible text the contrast with what is painted beneath it; transparent layers are mixed.
CONTRAST = """(() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (css) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = css; paint.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const light = (c) => {
    const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const grounds = (at) => {  // a gradient is as dark or as light as either of its ends
    const seen = [];
    for (let e = at; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      const ends = style.backgroundImage.match(/(rgba?|color)\\([^)]*\\)/g) || [];
      if (ends.length) seen.push(ends.map(rgba));
      seen.push([rgba(style.backgroundColor)]);
    }
    let found = [[255, 255, 255]];
    for (const layer of seen.reverse()) found = layer.flatMap((l) => found.map((f) => over(l, f)));
    return found;
  };
  const low = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const at = node.parentElement, box = at.getBoundingClientRect();
    if (!node.data.trim() || !box.width || ["STYLE", "SCRIPT", "TITLE"].includes(at.tagName.toUpperCase())) continue;
    const style = getComputedStyle(at), ink = rgba(at instanceof SVGElement ? style.fill : style.color);
    for (const ground of grounds(at)) {
      const [a, b] = [light(over(ink, ground)), light(ground)].sort((x, y) => y - x);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < LEAST) low.push(`${node.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
    }
  }
  return low;
})()""".replace("LEAST", str(LEAST))

# What reaches over the right edge, unless it lies in a region of its own that scrolls and takes the focus.
OVER = """[...document.querySelectorAll("body *")].filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !e.closest('[tabindex="0"], nav ul') &&
    getComputedStyle(e).position !== "absolute";
}).map((e) => `${e.tagName}.${e.getAttribute("class")}: ${e.textContent.slice(0, 30)}`)"""

# Words that a narrow column breaks into letters below one another.
SQUEEZED = """[...document.querySelectorAll("th, td, dt, dd, li, p")].filter((e) => {
  const box = e.getBoundingClientRect();
  return e.textContent.trim().length > 3 && box.width > 1 && box.width < 32 && box.height > 60;
}).map((e) => e.textContent.slice(0, 30))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page with everything on it, one of many layers with experts and scans, and each stored kind."""
    folder = tmp_path_factory.mktemp("pages")
    with tarfile.open(KINDS) as archive:
        archive.extractall(folder, filter="data")
    reports = {"whole": report(), "large": large()}
    reports |= {p.parent.name: ReportData.of(p.parent) for p in sorted((folder / "kinds").glob("*/manifest.json"))}
    for name, made in reports.items():
        (folder / f"{name}.html").write_text(render_html([made]), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


def large() -> ReportData:
    """A hybrid model of 60 layers, with names as long as they come."""
    before, after = {}, {}
    for i in range(60):
        mixer = {"role": "ssm", "ssm_heads": 48, "ssm_state": 128}
        experts = {"role": "mlp", "experts": 64, "channels": 1408}
        before[f"model.layers.{i}"] = {"mixer": mixer, "block_sparse_moe": experts}
        less = {"block_sparse_moe": experts | {"experts": 64 - i}}
        after[f"model.layers.{i}"] = less | ({} if i % 7 == 3 else {"mixer": mixer | {"ssm_heads": 48 - i % 40}})
    decisions = [
        cut(f"model.layers.{i % 60}.block_sparse_moe.experts {64 - i} -> {63 - i}", "experts", 9 + i**1.5 / 90, i / 400)
        for i in range(120)
    ]
    step = {"name": "an_uncommonly_long_name_of_a_step", "word": "shed.multi", "summary": "", "decisions": decisions}
    return report(
        name="a_pipeline_with_an_uncommonly_long_name",
        recipe={"text": RECIPE + "# " + "very_long_" * 40},
        profile={"before": before, "after": after},
        steps=(step,),
        measures=(*manifest().measures, *manifest().measures),
        machine={"cpu": "P" * 90},
    )


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_quiet_fits_and_can_be_read(pages, width, scheme, tmp_path_factory):
    summaries = tmp_path_factory.getbasetemp() / "pictures"
    summaries.mkdir(exist_ok=True)
    with browsing() as browser:
        for name, place in pages.items():
            browser.show(place, width, scheme)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, name
            assert browser.evaluate(OVER) == [], name
            assert browser.evaluate(SQUEEZED) == [], name
            browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, name
            assert browser.evaluate(CONTRAST) == [], name
            shown = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, shown[4:-1].split(","))) > 382) == (scheme == "light"), shown
            summary = browser.summary()
            assert len(summary) > 20_000
            (summaries / f"{name}-{width}-{scheme}.png").write_bytes(summary)
        assert {r["request"]["url"] for r in browser.told("Network.requestWillBeSent")} == {
            p.as_uri() for p in pages.values()
        }
        assert browser.told("Runtime.exceptionThrown") == browser.told("Runtime.consoleAPICalled") == []
        assert browser.told("Log.entryAdded") == []


def test_all_that_reacts_is_reached_by_keys_and_shows_that_it_is(pages):
    with browsing() as browser:
        browser.show(pages["whole"], 1280, "light")
        wanted = browser.evaluate(
            "[...document.querySelectorAll('a, button, summary, [tabindex]')].filter(e => e.checkVisibility())"
            ".map((e, i) => (e.dataset.place = i))"
        )
        reached = []
        for _ in wanted:
            browser.press("Tab")
            place, style, width = browser.evaluate(
                "(() => { const e = document.activeElement, s = getComputedStyle(e);"
                " return [Number(e.dataset.place), s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
            )
            assert style == "solid" and width >= 2
            reached.append(place)
        assert reached == wanted


def test_the_button_turns_the_colours_and_says_which(pages):
    with browsing() as browser:
        browser.show(pages["whole"], 1280, "light")
        before = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert browser.evaluate("document.getElementById('theme').getAttribute('aria-label')") == "Show in dark colours"
        browser.evaluate("document.getElementById('theme').click()")
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != before
        assert (
            browser.evaluate("document.getElementById('theme').getAttribute('aria-label')") == "Show in light colours"
        )


def test_pointing_at_a_dot_says_its_numbers(pages):
    with browsing() as browser:
        browser.show(pages["whole"], 1280, "light")
        x, y, says = browser.evaluate(
            "(() => { const dot = document.querySelector('.wide [aria-label^=\"cut 1:\"]'); dot.scrollIntoView({ behavior: 'instant', block: 'center' });"
            " const b = dot.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2, dot.getAttribute('aria-label')]; })()"
        )
        browser.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")  # it has scrolled
        browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        assert browser.evaluate("(t => t.hidden ? '' : t.textContent)(document.getElementById('tip'))") == says


def test_each_chart_has_a_name_and_a_table_for_those_who_do_not_see_it(pages):
    with browsing() as browser:
        for name, place in pages.items():
            browser.show(place, 390, "light")
            browser.ask("Accessibility.enable")
            tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
            images = [n for n in tree if n.get("role", {}).get("value") in ("image", "img") and not n.get("ignored")]
            assert all(len(n["name"]["value"]) > 20 for n in images), name
            figures = browser.evaluate("document.querySelectorAll('figure').length")
            assert len(images) == figures  # one of both drawings is shown
            assert browser.evaluate(
                "[...document.querySelectorAll('figure')].every(f => f.querySelector('details table'))"
            )
            heads = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
            assert heads[0] == 1 and all(b - a <= 1 for a, b in pairwise(heads)), heads
