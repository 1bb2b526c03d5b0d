"""Progress: plain lines, a heartbeat, JSON lines, and bars that leave a line behind."""

import io
import json
import re
import time

import pytest
from effc.compiler.core.events import (
    Recorded,
    StageBegan,
    StageEnded,
    Ticked,
    Warned,
    announcing_stage,
    iterate_and_report,
    listening_with,
)
from effc.compiler.core.progress_bars import BarRenderer, ItemRate, JsonLines, PlainRenderer, listening_to_progress
from effc.compiler.core.warned import model_remark
from effc.compiler.driver import api

MIB = 1 << 20


def stage(listen, name="thin", **ended):
    listen(StageBegan(name, "prune.channels", 2, 6))
    listen(Ticked("scoring", 3, 60, "best 21.3"))
    listen(StageEnded(name, 12.3, change="-0.44 M params", peak_bytes=512 * MIB, **ended))


def test_a_finished_stage_is_one_plain_line():
    out = io.StringIO()
    with PlainRenderer(out) as listen:
        stage(listen)
    assert out.getvalue() == "  2/6  thin          prune.channels  -0.44 M params  12 s  peak 512.0 MiB\n"


def test_a_cached_stage_says_so():
    out = io.StringIO()
    with PlainRenderer(out) as listen:
        listen(StageEnded("thin", 0.0, cached=True))
    assert out.getvalue().split() == ["thin", "cached"]


def test_a_long_stage_has_a_heartbeat():
    out = io.StringIO()
    with PlainRenderer(out, heartbeat=0.2) as listen:
        listen(StageBegan("thin", "prune.channels", 2, 6))
        listen(Ticked("scoring", 3, 60, "best 21.3"))
        deadline = time.monotonic() + 10
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    line = out.getvalue().splitlines()[0]
    assert line.startswith("  2/6  thin          … scoring 3/60, best 21.3  (")


def test_the_time_left_is_reckoned_from_the_work_at_hand_and_not_from_what_came_before():
    pace = ItemRate(Ticked("scoring", 10, 60, at=100.0))
    assert pace.seconds_left(Ticked("scoring", 10, 60), 101.0) is None
    assert pace.seconds_left(Ticked("scoring", 20, 60), 105.0) == 20.0
    assert pace.is_same_work(Ticked("scoring", 30, 60)) and not pace.is_same_work(Ticked("refitting", 1, 60))
    cuts = ItemRate(Ticked("cut 3, % of the budget", 30, 100))
    assert cuts.is_same_work(Ticked("cut 4, % of the budget", 40, 100))


def test_work_in_one_piece_says_what_comes_then():
    out = io.StringIO()
    with (
        PlainRenderer(out, heartbeat=0.1) as listen,
        listening_with(listen),
        announcing_stage("writing", "then measuring"),
    ):
        deadline = time.monotonic() + 10
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "… writing, then measuring  (" in out.getvalue().splitlines()[0]


def test_work_that_is_done_is_not_told_while_other_work_goes_on():
    out, label = io.StringIO(), "hashing model.safetensors, pieces of 16 MiB"
    with PlainRenderer(out, heartbeat=0.1) as listen, listening_with(listen):
        listen(StageBegan("capture", "", 1, 6))
        assert list(iterate_and_report(range(1), label)) == [0]
        deadline = time.monotonic() + 10
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "… running  (" in out.getvalue() and "hashing" not in out.getvalue() and "left" not in out.getvalue()


def test_what_is_deep_below_a_stage_is_told_as_a_part_of_it():
    heard = []
    with listening_with(heard.append), announcing_stage("measuring"):
        assert list(iterate_and_report("ab", "batches")) == ["a", "b"]
    assert [e.label for e in heard] == ["measuring", *["measuring: batches"] * 2, "measuring"]
    assert list(iterate_and_report("ab", "batches")) == ["a", "b"] and len(heard) == 4


def test_values_are_told_only_to_those_who_want_more():
    for verbose, count in ((0, 0), (1, 1)):
        out = io.StringIO()
        with PlainRenderer(out, verbose) as listen:
            listen(Recorded("perplexity(calib)", 21.3))
        assert len(out.getvalue().splitlines()) == count


def test_a_warning_and_a_shape_diff_are_shown():
    out = io.StringIO()
    with PlainRenderer(out) as listen:
        listen(Warned(model_remark("torch 2.8 wrote it")))
        stage(listen, dump="layers.7.mlp 1536 -> 1280\n")
    lines = out.getvalue().splitlines()
    assert lines[0] == "warning[model-remark]: torch 2.8 wrote it" and lines[2] == "layers.7.mlp 1536 -> 1280"


def test_bars_leave_a_line_for_each_stage():
    out = io.StringIO()
    with BarRenderer(out, color=False) as listen:
        stage(listen)
        listen(Warned(model_remark("[odd] brackets stay")))
    assert "✓  2/6  thin          prune.channels  -0.44 M params" in out.getvalue()
    assert "[odd] brackets stay" in out.getvalue()


def test_every_event_is_a_line_of_json():
    out = io.StringIO()
    stage(JsonLines(out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["StageBegan", "Ticked", "StageEnded"]
    assert events[1]["note"] == "best 21.3" and events[2]["peak_bytes"] == 512 * MIB


def test_quiet_silences_people_but_not_the_file(tmp_path, capsys):
    with listening_to_progress(quiet=True, events_path=tmp_path / "e.jsonl") as listen:
        stage(listen)
    assert capsys.readouterr().err == "" and len((tmp_path / "e.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_the_time_that_a_compile_states_counts_start_and_planning(effc, write, monkeypatch):
    build, built = api.build, []

    def planned_for_long(*args, **options):
        time.sleep(3)
        built.extend(build(*args, **options))
        return built

    monkeypatch.setattr(api, "build", planned_for_long)
    seconds = re.search(r"ok: compiled in (?:(\d+) min )?([\d.]+) s", effc("compile", write()).err)
    assert seconds and 60 * int(seconds[1] or 0) + float(seconds[2]) > sum(result.seconds for result in built) + 2
