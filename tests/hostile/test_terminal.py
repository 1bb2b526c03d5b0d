"""Names and texts of strangers reach a terminal without what would drive it, and programs as sound JSON."""

import json

import pytest
from effc.compiler.cli.main import main
from effc.compiler.cli.verbs.output import Screen
from effc.dsl.syntax.diagnostics import Fault
from effc.dsl.syntax.render import sanitize_for_terminal

EVIL = ("\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202e", "\u2066", "\x08\x08", "\r", "\ud800", "\x7f", "\u2028")


@pytest.mark.parametrize("text", EVIL, ids=ascii)
@pytest.mark.parametrize("color", ["always", "never"])
def test_an_answer_and_a_remark_hold_no_control_character(capsys, text, color):
    screen = Screen(color=color)
    screen.answer(f"model {text} of {screen.styled(text, 'bold')}")
    screen.note(f"reads {text}")
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
    assert sanitize_for_terminal(text) == text


@pytest.mark.parametrize(
    "words", [["check", "{}"], ["plan", "{}", "-q"], ["run", "{}"], ["diff", "a", "{}"], ["sign", "--new-key", "{}"]]
)
@pytest.mark.parametrize("text", ["\x1b[2J", "a\nok: b", "\x9b31m", "a\u2028b"], ids=ascii)
def test_names_of_the_command_line_hold_none(capsys, words, text):
    assert main([word.format(text) for word in words]) == 2
    out, err = capsys.readouterr()
    assert not out and text not in err and "holds U+" in err and "ok: b" not in err.splitlines()


def test_a_prompt_and_a_name_of_other_letters_may_be_what_they_like(capsys):
    assert main(["run", "no/such/näme 漢字", "--prompt", "a\n\x1b[2J"]) == 2
    assert "there is no `no/such/näme 漢字`" in capsys.readouterr().err


@pytest.mark.parametrize("made", [r'"con\u0000"', r'"a\u001b[2J"', r'"a\nb"', '"a\x9b31m"', r'"a\u2029b"'])
@pytest.mark.slow
def test_strings_of_recipes_hold_none(made, tmp_path, capsys):
    for model, out in ((f"hf({made})", '"out"'), ('zoo("tiny-llama")', made)):
        recipe = tmp_path / "r.effspec"
        recipe.write_text(f"effspec 1\nmodel base = {model}\npipeline lean(base) {{ }}\nemit lean {{ hf({out}) }}\n")
        assert main(["check", str(recipe)]) == 3
        assert "error[control-character]: " in capsys.readouterr().err


def test_params_from_outside_hold_none(tmp_path, capsys):
    recipe = tmp_path / "r.effspec"
    recipe.write_text(
        'effspec 1\nparam to: string = "out"\nmodel base = zoo("tiny-llama")\npipeline lean(base) { }\n'
        "emit lean { hf(to) }\n"
    )
    assert main(["check", str(recipe), "--set", "to=a\x1b[2J"]) == 2
    (tmp_path / "p.json").write_text('{"to": "a\\u0000"}')
    assert main(["check", str(recipe), "--params", str(tmp_path / "p.json")]) == 2
    err = capsys.readouterr().err
    assert err.count("error[unfit-override]: `to` holds U+00") == 2 and "\x1b" not in err


def test_a_name_of_megabytes_does_not_fill_the_screen(capsys):
    fault = Fault("odd", "Odd.")
    Screen().complain([fault(f"it has `{'a' * 5_000_000}`", help="b" * 9000)])
    Screen(format="github").complain([fault(f"it has `{'a' * 5_000_000}`")])
    out, err = capsys.readouterr()
    assert len(out) < 5000 and len(err) < 9000 and "(5000009 characters)" in out and "(5000009 characters)" in err


@pytest.mark.parametrize("format", ["text", "github"])
def test_faults_without_number_do_not_fill_the_screen(capsys, format):
    fault, warning = Fault("odd", "Odd."), Fault("odder", "Odder.", severity="warning")
    Screen(format=format).complain(
        [warning("a warning")] * 300 + [fault(f"file {n} is missing") for n in range(100_000)]
    )
    out, err = capsys.readouterr()
    assert len(out) + len(err) < 50_000 and "file 0 is missing" in out + err and "100100 more are left out" in err
