"""A page says what the manifest says, holds nothing that could run or load, and is made of every kind of artifact."""

import json
import re
import tarfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from effc.compiler.artifacts.manifest import Measure
from effc.compiler.artifacts.pages.chart import ATTRIBUTES, TAGS, sanitize_svg
from effc.compiler.artifacts.pages.page import render_html
from effc.compiler.artifacts.pages.report_data import ReportData
from effc.compiler.artifacts.pages.ways import accuracy_against_seconds_chart
from effc.compiler.artifacts.results_table import results_table
from effc.compiler.cli.main import main
from effc.compiler.cli.verbs.compile import results_text
from effc.compiler.cli.verbs.output import Screen
from effc.compiler.driver.emission import Artifact
from effc.compiler.driver.pipeline import Result
from effc.dsl.syntax.diagnostics import EXITS

from tests.compiler.artifacts.pages.report_data import RECIPE, manifest, report

pytest.importorskip("vl_convert")
KINDS = Path(__file__).parents[3] / "stored" / "kinds.tar.xz"
OF_SCRIPT = ("http:", "https:", "//", "javascript:", "data:")


class Reader(HTMLParser):
    """Elements with their attributes, and the text that is no style and no script."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("style", "script"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def whole() -> str:
    return render_html([report()])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    with tarfile.open(KINDS) as archive:
        archive.extractall(folder, filter="data")
    return folder / "kinds"


def test_numbers_are_those_of_the_manifest(whole):
    said = Reader(whole).text
    for number in (
        "1.84 M",
        "1.55 M",
        "−15.4 %",
        "20.0 ms",
        "18.0 ms",
        "limit 1.65 M",
        "limit 19 ms",
        "5e-05",
        "5.94 MiB",
    ):
        assert number in said, number
    assert "b" * 64 in said and "4" * 64 in said and "a" * 64 in said
    for step in ("20 s", "30 s", "256.0 MiB"):
        assert step in said, step


def test_each_outcome_is_said_in_words_and_the_worst_leads(whole):
    said = Reader(whole).text
    assert "1 of 2 expectations is undecided" in said
    assert "✓ holds" in said and "after 8 rounds it lies somewhere" in said
    assert "The expectation holds" in render_html([report(expectations=manifest().expectations[:1])])


def test_forms_stand_beside_the_original_and_memory(whole):
    said = Reader(whole).text
    assert "The same 256 tokens of text.heldout through" in said
    for row in ("original 0 100.0 % 32.12", "in memory 0.1015 75.8 % 33.75", "compact 0.1078 0.0067 76.6 % 33.88"):
        assert row in said, row


@pytest.mark.slow
def test_perplexity_of_the_few_tokens_leads_where_no_measure_is_on_rows(whole):
    label = "perplexity of 256 tokens of text.heldout +5.4 % 32.12 → to 33.88"
    assert label in Reader(whole).text
    measures = (*manifest().measures, Measure("accuracy(quiz)", "", 0.5, 0.5))
    assert label not in Reader(render_html([report(measures=measures)])).text
    unknown = tuple(replace(a, perplexity=p) for a, p in zip(manifest().accounts, (0.0, None, 1e300), strict=True))
    assert all(render_html([report(accounts=accounts)]) for accounts in (unknown, unknown[:1], ()))


def test_layers_stand_in_their_order_with_what_went(whole):
    table = whole[whole.index('class="layers') :]
    numbers = re.findall(r'<th scope="row" class="right" data-tip="model\.layers\.(\d+)">', table)
    assert numbers == [str(i) for i in range(11)]
    said = Reader(whole).text
    assert "mlp 288 of 4224 channels went (7 %)" in said
    assert "self_attn 7 of 44 KV heads went (16 %)" in said
    assert 'data-tip="model.layers.1, self_attn: 1 of 4 KV heads left, 3 went"' in whole
    assert 'data-tip="model.layers.2, self_attn: the whole branch is gone"' in whole


def test_a_page_of_quantized_weights_has_the_error_of_each_module_and_no_table_of_equal_widths():
    errors = {"model.layers.0.mlp.up_proj": 0.031, "model.layers.1.mlp.up_proj": 0.052}
    step = {"name": "q", "word": "quantize.gptq", "decisions": [{"bits": 4, "quantized": {"a": 0.1}, "errors": errors}]}
    layers = {path.partition(".mlp")[0]: {"mlp": {"role": "mlp", "channels": 384}} for path in errors}
    page = render_html([report(steps=(step,), profile={"before": layers, "after": layers})])
    assert "Error of 2 modules, between 3.1% and 5.2%." in page and "Zeros in each module" not in page
    assert "Every layer is as wide as it was." in page and 'class="layers' not in page


def test_every_chart_has_a_sentence_and_its_numbers_as_a_table(whole):
    elements = Reader(whole).elements
    drawings = [a for tag, a in elements if tag == "div" and a.get("role") == "img"]
    assert len(drawings) == 2 * 4  # cuts, losses, zeros and a timing, wide and narrow
    assert all(len(a["aria-label"]) > 40 for a in drawings)
    assert whole.count("<summary>The numbers</summary>") == 4
    said = Reader(whole).text
    for cell in ("model.layers.1.mlp 384 -&gt; 96", "9.00 %", "11.75", "3.75", "25.0%", "0.900"):
        assert cell in whole, cell
    assert "0.90 times the original's time in the median round; between 0.90 and 0.90 with 95% confidence" in said


def test_lines_of_the_recipe_have_what_came_of_them(whole):
    lines = whole[whole.index('class="recipe"') :].partition("</ol>")[0].split("<li>")[1:]
    assert len(lines) == len(RECIPE.splitlines())
    assert "−288 channels · 30 s" in lines[4]
    assert "holds: 1.55 M" in lines[7] and "undecided: 18.0 ms" in lines[8]
    assert "5.94 MiB, 1 check in fresh processes" in lines[10]


@pytest.mark.parametrize("kind", ["whole", "front", "flower", "peft", "reft", "rttc"])
def test_a_page_of_any_kind_loads_nothing_and_runs_its_own_script_alone(kind, whole, kinds):
    text = whole if kind == "whole" else render_html([ReportData.of(kinds / kind)])
    found = Reader(text)
    for tag, attributes in found.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "foreignobject")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "src", "srcset", "xlink:href", "action")
            assert name != "href" or value.startswith("#")
    assert not any(word in re.sub(r"<pre.*?</pre>", "", text) for word in ("http:", "https:", "url(", "@import"))
    assert [tag for tag, _ in found.elements].count("script") == 1
    policy = next(a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))


EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'{{7*7}}\u202e"


def test_nothing_that_an_artifact_says_becomes_markup():
    made = manifest()
    decisions = [
        {**d, "cut": d["cut"] + EVIL, "kind": EVIL, "by": EVIL} if "cut" in d else d for d in made.steps[0]["decisions"]
    ]
    decisions[3] = {"zeros": {EVIL: 0.5, f"b.{EVIL}": 0.25}}
    profile = {
        side: {
            f"{path}{EVIL}": {f"{b}{EVIL}": facts for b, facts in branches.items()} for path, branches in all_.items()
        }
        for side, all_ in made.profile.items()
    }
    text = render_html(
        [
            ReportData(
                EVIL,
                manifest(
                    name=EVIL,
                    kind=EVIL,
                    recipe={"text": RECIPE + EVIL, "name": EVIL, "params": {EVIL: EVIL}},
                    steps=({"name": EVIL, "word": EVIL, "summary": EVIL, "decisions": decisions, "changes": [EVIL]},),
                    profile=profile,
                    files={EVIL: (1, EVIL)},
                    lock={"inputs": {EVIL: EVIL}, "versions": {EVIL: EVIL}},
                    machine={"cpu": EVIL, "os": [EVIL]},
                    notes=(EVIL,),
                    run={"created": EVIL, "timings": {EVIL: {**made.run["timings"]["decode.p50"], "unit": EVIL}}},
                ),
                EVIL,
            )
        ]
    )
    found = Reader(text)
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert "img" not in [tag for tag, _ in found.elements]
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert "\u202e" not in text
    assert "49" not in found.text.split("{{7*7}}")[0][:10] and "{{7*7}}" in found.text


@pytest.mark.parametrize(
    "run",
    [
        {"timings": [1, 2]},
        {"timings": {"a": {"original": [float("nan"), "x"], "compiled": [None, True]}}},
        {"steps": {"a": 1}, "seconds": [], "created": 5},
        {"steps": [None, {"seconds": "1e9", "planned": 10**400}]},
    ],
)
def test_tables_of_another_form_are_left_out(run):
    assert "Where it comes from" in render_html([report(run=run)])


def test_what_draws_charts_leaves_known_elements_alone():
    drawn = sanitize_svg(
        '<svg xmlns="http://www.w3.org/2000/svg" onload="x()"><script>x()</script><style>a</style>'
        '<a href="javascript:x()"><rect/></a><g><path d="M0.123456,1" style="fill:red"/></g></svg>'
    )
    root = ElementTree.fromstring(drawn)
    assert {e.tag for e in root.iter()} <= TAGS and all(set(e.attrib) <= ATTRIBUTES for e in root.iter())
    assert "x()" not in drawn and 'd="M0.12,1"' in drawn


def test_the_verb_writes_a_page_and_says_where(kinds, tmp_path, capsys):
    place = tmp_path / "front.html"
    assert main(["report", str(kinds / "front"), "-o", str(place)]) == 0
    assert "front.html" in capsys.readouterr().out
    text = place.read_text()
    assert text.startswith("<!doctype html>") and "points of the front" in text.lower()
    assert main(["report", str(kinds / "front"), "-o", "-"]) == 0
    assert capsys.readouterr().out == text


def test_artifacts_of_several_pipelines_are_compared_with_a_page_of_each_beside(kinds, tmp_path, capsys):
    place = tmp_path / "both.html"
    assert main(["report", str(kinds / "front"), str(kinds / "reft"), "-o", str(place), "--format", "json"]) == 0
    pages = json.loads(capsys.readouterr().out)["pages"]
    text = place.read_text()
    assert [Path(page).name for page in pages] == ["both-1.html", "both-2.html"]
    assert all(f'href="{Path(page).name}"' in text and Path(page).is_file() for page in pages)
    assert "2 artifacts of 2 results" in text


@pytest.mark.slow
def test_a_folder_of_artifacts_is_reported_as_what_lies_in_it(kinds, tmp_path):
    place = tmp_path / "all.html"
    assert main(["report", str(kinds), "-o", str(place)]) == 0
    for artifact in ("front", "reft"):
        assert artifact in Reader(place.read_text()).text
    assert main(["report", str(tmp_path), "-o", str(place)]) == EXITS["environment"]


def test_the_table_of_results_has_measures_in_columns_and_what_came_of_bounds():
    small, large = report(), report(name="large", expectations=(), measures=(Measure("bytes", "B", None, 2048.0),))
    head, original, first, second = results_table([small, large])
    assert head == ("pipeline", "artifact", "target", "params", "bytes", "decode.p50", "bounds")
    assert original == ("original", "", "", "1.84 M", "", "20.0 ms", "")
    assert first[3:] == ("1.55 M", "", "18.0 ms", "1 of 2 undecided")
    results = [Result(None, [Artifact(Path(s.location), s.manifest, ())]) for s in (small, large)]
    assert "2 artifacts of 2 results" in results_text(results, Screen("text", "never"))
    assert results_text(results[:1], Screen("text", "never")) == ""
    assert second[0] == "large" and second[3:] == ("", "2.00 KiB", "", "")


def test_test_time_compute_shows_what_each_way_is_worth_and_what_there_was_to_choose():
    trial = {"right": {"direct": False, "rag": True, "ttt": True}, "seconds": {"direct": 0.1, "rag": 0.3, "ttt": 4.0}}
    curve = [{"accuracy": share, "seconds": share + 0.2, "direct": 0, "rag": 0} for share in (0.25, 0.75)]
    told = {
        "reward": "self",
        "auc": {"all": 0.625},
        "trials": [trial, trial],
        "curve": curve,
        "chosen": {"accuracy": 0.5, "seconds": 0.7},
    }
    shown = Reader(render_html([replace(report(), calibration=told)]))
    assert "Ways to answer" in shown.text and "area of 0.62 under the curve" in shown.text
    assert "with samples 100% 0.3 s" in shown.text and "choices of the policy 75% 0.95 s" in shown.text
    assert "the policy, on questions held out 50% 0.7 s" in shown.text
    assert "Ways to answer" not in Reader(render_html([report()])).text


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"trials": 5, "curve": [1, {"accuracy": "<b>"}], "chosen": [1]},
        {"trials": [{"right": 1}] * 3, "chosen": {"accuracy": float("nan"), "seconds": 1.0}},
    ],
)
def test_a_calibration_of_another_form_shows_nothing(told):
    assert accuracy_against_seconds_chart(told) is None


@pytest.mark.parametrize("character", ["\x1b", "\x00", "\ufffe", "\ud800"])
def test_a_character_that_xml_can_not_hold_is_shown_as_unknown_in_a_chart(character):
    from effc.compiler.artifacts.pages.modules import zero_share_chart

    chart = zero_share_chart([{"zeros": {f"a.{character}q": 0.5, f"b.{character}q": 0.25, "c.k": 0.1}}])
    assert chart is not None and "\ufffd" in chart.wide and character not in chart.wide
