"""Names and texts of strangers reach a terminal without what would drive it, and programs as sound JSON."""

import json

import pytest
from effc.compiler.commands.screen import Screen
from effc.dsl.render import visible

EVIL = ("\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202e", "\u2066", "\x08\x08", "\r", "\ud800", "\x7f", "\u2028")


@pytest.mark.parametrize("text", EVIL, ids=ascii)
@pytest.mark.parametrize("color", ["always", "never"])
def test_an_answer_and_a_remark_hold_no_control_character(capsys, text, color):
    screen = Screen(color=color)
    screen.answer(f"model {text} of {screen.styled(text, 'bold')}")
    screen.say(f"reads {text}")
    out, err = capsys.readouterr()
    assert text not in out + err and "\N{REPLACEMENT CHARACTER}" in out
    assert out.count("\x1b") == err.count("\x1b") + (2 if color == "always" else 0)


@pytest.mark.parametrize("text", EVIL, ids=ascii)
def test_json_says_them_as_escapes(capsys, text):
    Screen(format="json").answer_json("inspect", name=text, other="naïve 漢字")
    out = capsys.readouterr().out
    assert json.loads(out)["name"] == text and text not in out and "naïve 漢字" in out


def test_letters_spaces_and_lines_of_any_language_stay():
    text = "naïve\t漢字\u00a0\u3000ok\n∆ ✓"
    assert visible(text) == text
