"""Limits of `effc pick` as users write them."""

import pytest
from effc.compiler.driver.point_limits import Limit, parse_limits, split_limit_texts
from effc.dsl.syntax.diagnostics import Reject

CLOCK = "decode.p50(prompt: 93, steps: 32)"
POINT = {"params": (36_500.0, "", "lower"), CLOCK: (0.8, "ms", "lower"), "perplexity(o)": (4.0, "", "lower")}


@pytest.mark.parametrize("text", ["36.5k", "36.5 k", "40K", "1M", "1G", "1B"])
def test_amounts_are_read_as_tables_print_them(text):
    assert Limit("params", text).is_met(POINT)


@pytest.mark.parametrize("text", ["many", "nan", "-3", "3x", "", "1e999"])
def test_what_is_no_amount_is_told_as_such(text):
    with pytest.raises(Reject, match="no-amount"):
        parse_limits([f"params={text}"])


def test_an_amount_is_of_the_kind_of_its_measure():
    small = {"bytes": (600.0, "B", "lower"), **POINT}
    assert Limit("bytes", "1 KiB").is_met(small) and not Limit("bytes", "512 B").is_met(small)
    for metric, text in (("params", "30ms"), ("params", "2MiB"), ("bytes", "30ms"), ("decode.p50", "2MiB")):
        with pytest.raises(Reject, match="no-amount"):
            Limit(metric, text).is_met(small)


def test_the_name_of_the_only_measure_is_enough():
    assert Limit("decode.p50", "1ms").is_met(POINT) and not Limit("perplexity", "3").is_met(POINT)


def test_of_several_measures_of_one_name_the_user_says_which():
    with pytest.raises(Reject, match="several-measures") as caught:
        Limit("perplexity", "3").is_met({**POINT, "perplexity(n)": (3.0, "", "lower")})
    assert "perplexity(o), perplexity(n)" in caught.value.diagnostics[0].help


def test_commas_in_brackets_part_no_limits():
    assert split_limit_texts(f"{CLOCK}=1ms,params=1M") == [f"{CLOCK}=1ms", "params=1M"]


def test_pick_names_the_folder_that_is_no_artifact_before_limits(tmp_path, capsys):
    from effc.compiler.cli.main import main

    assert main(["pick", str(tmp_path / "nowhere"), "-o", str(tmp_path / "x")]) != 0
    assert "no-artifact" in capsys.readouterr().err
