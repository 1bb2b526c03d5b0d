"""What strangers name things reaches CI as names: no command to its runner, no cell of a table, no broken XML."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from effc.compiler.cli.verbs.gate_report import junit_report, markdown_report
from effc.compiler.cli.verbs.output import Screen
from effc.compiler.cli.verbs.speech import SafeText
from effc.compiler.cli.verbs.test import report_file_text
from effc.compiler.driver import api
from effc.compiler.driver.judging import retest
from effc.compiler.driver.judging.baseline import Drift
from effc.compiler.driver.judging.comparison import Comparison
from effc.compiler.driver.judging.gate import BoundVerdict
from effc.dsl.syntax.diagnostics import Fault
from effc.dsl.syntax.render import sanitize_for_terminal
from effc.dsl.syntax.source import Source, Span
from hypothesis import given
from hypothesis import strategies as st

COMMANDS = (
    "::set-output name=a::b",
    "  ::add-mask::a",
    "\t::stop-commands::x",
    "##vso[task.setvariable variable=a]b",
    "##[error]a",
    "##teamcity[a]",
    "a ##[add-mask]b",
)
ODD = "a|b `c` | ![x](http://y/z.png) <img src=x onerror=1> ]]> &amp; \x00\x1b[2J \udcff \u202e \n| **ok** |\n::set-output name=a::b"


def runs(line: str) -> bool:
    """Whether GitHub's runner or those of Azure and TeamCity take a line for a command."""
    return line.strip().startswith("::") or any(mark in line for mark in ("##[", "##vso[", "##teamcity["))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("color", ["always", "never"])
def test_no_line_of_others_words_is_a_command(capsys, command, color):
    screen = Screen(color=color)
    screen.answer(f"model\n{command}\n{screen.styled('a', 'bold')}")
    screen.answer(screen.table([[command, "b"], ["c", command]], head=False))
    screen.note(command)
    fault = Fault("odd", "Odd.")
    screen.complain([fault(f"it is\n{command}", help=f"a\n{command}", note=f"b\n{command}")])
    Screen(format="json").answer_json("inspect", name=command, many=[command])
    out, err = capsys.readouterr()
    assert not [line for line in (out + "\n" + err).splitlines() if runs(line)]
    assert json.loads(out[out.index("\n{\n") :])["name"] == command


@pytest.mark.parametrize("command", COMMANDS)
def test_an_annotation_is_one_command_and_what_it_says_is_none(capsys, command):
    source = Source(f"a,line=9::{command}\n.effspec", "effspec 1\n")
    fault = Fault("odd", "Odd.")
    found = fault(f"x%0A\r\n{command}", Span(source, 0, 7), help=f"a\n{command}")
    Screen(format="github").complain([found])
    (line,) = capsys.readouterr().out.splitlines()
    properties, _, message = line.removeprefix("::error ").partition("::")
    assert line.startswith("::error file=a%2Cline=9") and properties.count("=") == properties.count(
        ","
    ) + 1 + 1 + command.count("=")
    assert "%250A%0D%0A" in message


def test_what_looks_like_one_elsewhere_stays():
    for text in ("std::vector", "a :: b", "# title", "## title", "a[0] # b", "##", "naïve: ::"):
        assert sanitize_for_terminal(text) == text


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    recipe = tmp_path_factory.mktemp("runners") / "r.effspec"
    recipe.write_text(
        'effspec 1\nmodel base = zoo("tiny-llama")\npipeline lean(base) { less = clean.dead() }\n'
        'emit lean { hf("out") }\nexpect lean { params <= 1.0 * base }\n'
    )
    session = api.open_session(recipe)
    (plan,) = api.plan_all_pipelines(session)
    (bound,) = plan.pipeline.expects
    missed = BoundVerdict(bound, 2.0, 1.0, ODD, passed=False, high=1.0)
    drifts = (Drift(ODD, ODD, "worse", 1.0, 2.0, 1.5), Drift(ODD, ODD, "gone", 1.0, None))
    return [retest.Tested(Path(f"out/{ODD}"), "out", plan, Comparison((missed,), ()), (), drifts)]


def test_a_table_in_markdown_has_the_cells_that_it_has(results):
    lines = markdown_report(results).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(lines) == 10 and {row.count("|") for row in rows} == {5} and not any(map(runs, lines))
    assert not re.search(r"(?<!\\)\]\(", "".join(cell for row in rows for cell in row.split("|")[2:]))


def test_junit_is_xml_and_holds_no_control_character(results, tmp_path):
    top = ElementTree.fromstring(junit_report(results))
    assert len(top.findall(".//testcase")) == 3
    for suffix in (".xml", ".md", ".json"):
        (tmp_path / f"report{suffix}").write_text(report_file_text(results, suffix), encoding="utf-8")


PIECES = st.lists(st.text("a:# \n[\x1b\u202e", max_size=6), max_size=8)


@given(PIECES)
def test_what_a_model_says_is_as_safe_in_pieces_as_in_one(pieces):
    speech = SafeText()
    assert "".join(map(speech.safe_part, pieces)) + speech.remaining_text() == sanitize_for_terminal("".join(pieces))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [1, 2, 3, 1000])
def test_a_model_says_no_command_however_its_words_are_cut(command, width):
    speech, text = SafeText(), f"It is\n{command}\x1b[2J\n{' ' * 200}{command}\n{command}"
    cut = [text[at : at + width] for at in range(0, len(text), width)]
    shown = "".join(map(speech.safe_part, cut)) + speech.remaining_text()
    assert not [line for line in shown.splitlines() if runs(line)] and "\x1b" not in shown


def test_words_of_a_model_come_at_once():
    speech = SafeText()
    assert [speech.safe_part(text) for text in ("It", " is:", " so", "\n", "and: #", "1")] == [
        "It",
        " is:",
        " so",
        "\n",
        "and: ",
        "",
    ]
    assert speech.safe_part(" ") == "#1 "
