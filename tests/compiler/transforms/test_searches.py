"""What card, page and `effc inspect` say of searches."""

from effc.compiler.artifacts.search_summary import search_summary_lines, search_summary_text

CUT = {"cut": "a", "scores": {"a": 1.0, "b": 2.0}}


def test_scores_are_counted_and_what_estimates_left_out_is_said():
    assert search_summary_text([CUT, CUT]) == "2 cuts, 4 scores"
    later = {**CUT, "left_out": 7, "below": ["b"]}
    assert search_summary_text([{**CUT, "left_out": 9}, later]) == (
        "2 cuts, 4 scores; 7 candidates never scored, as estimates showed them to lose; "
        "1 estimate too high, which widened the bound"
    )


def test_steps_that_searched_nothing_and_what_is_no_count_are_passed_over():
    assert search_summary_text([]) == "" and search_summary_text([{"zeros": {}}, 3, None, {"scores": []}]) == ""
    assert search_summary_text([{**CUT, "left_out": "many", "below": 4}]) == "1 cut, 2 scores"
    assert search_summary_lines([{"name": "slim", "decisions": [CUT]}, {"name": "other"}]) == ["slim: 1 cut, 2 scores"]
