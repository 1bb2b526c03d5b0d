"""Recipes with open steps, and the recipes that close them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from effc.compiler.cli.main import main
from effc.compiler.core.cache import Cache
from effc.compiler.driver.api import open_session
from effc.compiler.driver.tuning.alternatives import allowed_candidates
from effc.compiler.driver.tuning.journal import Journal
from effc.compiler.driver.tuning.tune import Outputs, max_num_compiled
from effc.compiler.driver.tuning.wish import Wish, read_wish
from effc.dsl.syntax.diagnostics import Reject

RECIPE = """effspec 1
use std.text
model base = zoo("tiny-llama")
# rows that only the search reads
data dev = text("dev.txt", samples: 4, length: 32)
pipeline fast(base) {{
  {step}
}}
expect fast {{ {bounds} }}
emit fast {{ {target} }}
"""
CALIB = 'data calib = text("calib.txt", samples: 4, length: 32)\n'
HEALED = "10 % pruned and healed"
STEP = "best = search.steps(optimize: {optimize}, data: text.calib, choose: dev, within: {within}{more})"
# known without weights
MISTAKES = [
    ({"bounds": "perplexity(text.calib) <= 1.05 * base"}, "rows-read-before"),
    ({"bounds": "perplexity(dev) <= 1.05 * base"}, "rows-read-before"),
    ({"more": ", train: text.heldout"}, "rows-read-before"),
    ({"target": 'native("a") hf("b")'}, "not-open"),
    ({"target": 'report("page.html")'}, "not-open"),
    ({"target": 'native("a") report("page.html")', "optimize": "bytes, against: params"}, "not-open"),
    ({"more": ") more = " + STEP[7:-7].format(optimize="bytes", within="1min")}, "not-open"),
    ({"optimize": "bytes, against: bytes"}, "unfit-choices"),
    ({"more": ', among: ["nothing.*"]'}, "unmatched-pattern"),
    ({"more": ', among: ["int8", "quantize.gptq"]'}, "unmatched-pattern"),
    ({"more": ', among: ["sparsify.*"]', "target": 'hf("a")'}, "unmatched-pattern"),
]


def written(
    tmp_path: Path,
    *,
    bounds: str = "perplexity(text.heldout) <= 1.05 * base",
    target: str = 'native("fast")',
    optimize: str = "decode.p50",
    within: str = "5min",
    more: str = "",
) -> Path:
    (tmp_path / "dev.txt").write_text("In the beginning was the word. " * 60)
    file = tmp_path / "w.effspec"
    step = STEP.format(optimize=optimize, within=within, more=more)
    file.write_text(RECIPE.format(step=step, bounds=bounds, target=target))
    return file


def wish_of(file: Path, cache: Path) -> Wish:
    """A wish; tests that only read share a cache, `tmp_path.parent / "texts"`, so that std.text is cut into rows once."""
    return read_wish(open_session(file, cache_dir=cache))


def test_rows_of_the_target_are_part_of_what_a_journal_is_of_and_no_bound_reads_them(tmp_path):
    target = 'gguf("fast", type: q4_k, data: dev)'
    with pytest.raises(Reject, match="which `gguf` learned from"):
        wish_of(written(tmp_path, target=target, bounds="perplexity(dev) <= 1.05 * base"), tmp_path.parent / "texts")
    journals = []
    for text in ("In the beginning. ", "In the end. "):
        file = written(tmp_path, target=target, optimize="bytes")
        (tmp_path / "calib.txt").write_text(text * 100)
        file.write_text(file.read_text().replace("data: dev)", "data: calib)").replace("data dev", CALIB + "data dev"))
        journals.append(Journal.read_or_make(wish_of(file, tmp_path.parent / "texts"), Cache(tmp_path / "cache")).parts)
    assert journals[0] != journals[1]


def test_a_recipe_with_open_steps_checks_and_is_planned_by_tune_alone(tmp_path, capsys):
    file = written(tmp_path)
    assert main(["check", str(file)]) == 0
    assert main(["plan", str(file)]) == 3
    assert "open-steps" in capsys.readouterr().err


@pytest.mark.slow
def test_every_candidate_is_a_recipe_that_checks_and_reads_no_rows_of_the_search(tmp_path):
    wish = wish_of(written(tmp_path), tmp_path.parent / "texts")
    for candidate in allowed_candidates(wish):
        text = wish.text_with_step_replaced(candidate.steps("text.calib"), candidate.numbers.arguments)
        assert "search.steps" not in text and "dev" not in text, text
        checked = wish.session_with_text(text).check()
        assert not [d for d in checked.diagnostics if d.severity == "error"], (candidate.name, checked.diagnostics)


def test_the_unchanged_candidate_comes_first_and_changes_nothing_but_what_is_open(tmp_path):
    wish = wish_of(written(tmp_path), tmp_path.parent / "texts")
    unchanged = allowed_candidates(wish)[0]
    text = wish.text_with_step_replaced(unchanged.steps("text.calib"), unchanged.numbers.arguments)
    assert "pipeline fast(base) {}" in text
    assert 'native("fast")' in text and "perplexity(text.heldout) <= 1.05 * base" in text


def test_arguments_of_the_target_that_are_written_stay(tmp_path):
    wish = wish_of(written(tmp_path, target='native("fast", weights: int4)'), tmp_path.parent / "texts")
    arguments = {c.numbers.arguments for c in allowed_candidates(wish)}
    assert not [a for a in arguments if "weights" in a]


def test_a_comment_behind_the_last_argument_of_the_target_stays_one(tmp_path):
    wish = wish_of(written(tmp_path, target='native(\n  "fast",  # phone\n)'), tmp_path.parent / "texts")
    text = wish.text_with_step_replaced([], "weights: int8")
    assert "weights: int8" in text and "# phone" in text
    assert not [d for d in wish.session_with_text(text).check().diagnostics if d.severity == "error"], text


def test_among_narrows_what_is_tried(tmp_path):
    wish = wish_of(written(tmp_path, more=', among: ["int8"]'), tmp_path.parent / "texts")
    assert {c.name for c in allowed_candidates(wish)} == {"default format", "int8", "int8, inputs int16"}


def test_pruned_candidates_are_healed_where_rows_to_train_on_are_named(tmp_path):
    plain = wish_of(written(tmp_path), tmp_path.parent / "texts")
    assert not [c for c in allowed_candidates(plain) if "healed" in c.name]
    wish = wish_of(written(tmp_path, more=", train: text.train"), tmp_path.parent / "texts")
    healed = next(c for c in allowed_candidates(wish) if c.name == "10 % pruned and healed")
    pruned, trained = healed.steps("text.calib")
    assert "prune.multi(remove: 10%" in pruned and "tune.heal(data: text.train, held_out: text.calib" in trained


@pytest.mark.parametrize("model, word", [("tiny-llama", "prune.multi"), ("tiny-hybrid", "shed.multi")])
def test_shapes_are_cut_by_the_pass_that_knows_all_parts_of_the_model(model, word, tmp_path):
    file = written(tmp_path, target='hf("slim")', bounds="perplexity(text.heldout) <= 2 * base", optimize="params")
    file.write_text(file.read_text().replace("tiny-llama", model))
    wish = wish_of(file, tmp_path.parent / "texts")
    steps = {c.name: c.steps("text.calib") for c in allowed_candidates(wish)}
    assert steps["10 % pruned"][0].startswith(f"slim = {word}(remove: 10% of params, group: 32,")


def test_formats_for_each_module_are_given_bits_by_the_width_of_the_model(tmp_path):
    wish = wish_of(written(tmp_path), tmp_path.parent / "texts")
    steps = {c.name: c.steps("text.calib") for c in allowed_candidates(wish)}
    assert steps["mixed, 6 bits"] == ["cpu = lower.mixed(keep: 18.75% of bytes, data: text.calib)"]


@pytest.mark.parametrize(
    "options, slug",
    [
        ({"bounds": "bytes <= 3MB bytes >= 4MB"}, "contradicting-bounds"),
        ({"bounds": "bytes <= 0.3MB", "more": ', among: ["int8", "int4*"]'}, "unreachable-bound"),
        ({"bounds": "bytes <= 0MB"}, "unreachable-bound"),
        ({"bounds": "params <= 20K"}, "unreachable-bound"),
        ({"bounds": "perplexity(text.heldout) <= -1"}, "unreachable-bound"),
        ({"bounds": "agreement(text.heldout) >= 1.5"}, "unreachable-bound"),
        pytest.param({"bounds": "bytes <= 0.05 * base"}, "unreachable-bound", marks=pytest.mark.slow),
        *MISTAKES,
    ],
)
def test_wishes_that_nothing_can_fulfil_are_refused_before_weights_are_read(options, slug, tmp_path, capsys):
    from effc.compiler.driver.tuning.trials import Trials

    file = written(tmp_path, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "measure", lambda self, *_: pytest.fail("weights were read"))
        for more in ([], ["--explain"]):
            command = [
                "tune",
                str(file),
                "-o",
                str(tmp_path / "out"),
                "--cache-dir",
                str(tmp_path.parent / "texts"),
                *more,
            ]
            assert main(command) in (2, 3)
            error = capsys.readouterr().err
            assert f"[{slug}]" in error and "w.effspec:" in error, error


@pytest.mark.parametrize("options, slug", MISTAKES)
def test_a_check_finds_all_that_is_wrong_with_a_wish_without_weights(options, slug, tmp_path, capsys):
    assert main(["check", str(written(tmp_path, **options))]) == 3
    error = capsys.readouterr().err
    assert f"[{slug}]" in error and "w.effspec:" in error and "^^" in error, error


def test_a_check_of_open_steps_imports_no_torch(tmp_path):
    code = f"import sys; from effc import check; check({str(written(tmp_path))!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_zeros_are_tried_where_their_pass_alone_is_named(tmp_path):
    wish = wish_of(written(tmp_path, more=', among: ["sparsify.*", "int8"]'), tmp_path.parent / "texts")
    assert {"50 % zeros", "50 % zeros, int8"} <= {c.name for c in allowed_candidates(wish)}


def test_what_packing_of_zeros_loses_is_judged_by_the_bounds_of_the_wish_alone(tmp_path):
    wish = wish_of(written(tmp_path), tmp_path.parent / "texts")
    packing = {c.name: c.steps("text.calib")[-1] for c in allowed_candidates(wish) if c.zeros.steps}
    assert packing["50 % zeros, int8"].endswith("(format: sparse_int8, data: text.calib, divergence: 10)")
    assert packing["50 % zeros, sparse_cpu"].endswith("(format: auto, data: text.calib)")


def test_one_variant_is_searched_and_the_others_are_refused_with_a_remedy(tmp_path, capsys):
    file = written(tmp_path)
    matrix = "param n: int = 1\nmatrix n: [1, 2]\nmodel base"
    text = file.read_text().replace("model base", matrix, 1)
    file.write_text(text.replace("  best", "  cut = prune.blocks(remove: n, score: perplexity(text.calib))\n  best"))
    command = ["tune", str(file), "--explain", "--candidate", "int8", "--cache-dir", str(tmp_path.parent / "texts")]
    assert main(command) == 3 and "--set NAME=VALUE" in capsys.readouterr().err
    assert main([*command, "--set", "n=1"]) == 0


@pytest.mark.parametrize("confidence, looks", [("", 3), (" with 95% confidence", 1)])
def test_rows_that_give_a_confidence_are_looked_at_once(confidence, looks, tmp_path):
    bounds = f"perplexity(text.heldout) <= 1.05 * base{confidence}"
    assert max_num_compiled(wish_of(written(tmp_path, bounds=bounds), tmp_path.parent / "texts")) == looks


def test_a_page_that_this_search_did_not_write_is_not_replaced(tmp_path):
    wish = wish_of(written(tmp_path, target='native("fast") report("page.html")'), tmp_path.parent / "texts")
    outputs = Outputs(
        wish, Journal.read_or_make(wish, Cache(tmp_path / "cache")), tmp_path / "w-tuned.effspec", tmp_path, False
    )
    outputs.journal.write_recipe(outputs.recipe, "effspec 1\n")
    assert outputs.may_replace_outputs_or_reject("")
    page = tmp_path / "page.html"
    page.write_text("somebody's")
    with pytest.raises(Reject, match="output-exists"):
        outputs.may_replace_outputs_or_reject("")
    outputs.journal.note_written(page.read_text())
    assert outputs.may_replace_outputs_or_reject("")


def test_a_recipe_without_open_steps_is_none_to_tune(tmp_path):
    file = written(tmp_path)
    file.write_text(file.read_text().replace("search.steps", "prune.blocks").replace("search.steps", ""))
    with pytest.raises(Reject):
        wish_of(file, tmp_path.parent / "texts")


def test_choosing_by_the_rows_that_passes_read_is_refused_with_a_place(tmp_path, capsys):
    file = written(tmp_path)
    file.write_text(file.read_text().replace("choose: dev", "choose: text.calib").replace("data dev", "# data dev"))
    assert main(["check", str(file)]) == 3
    assert "`choose`" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["w-tuned.effspec", "out/fast/mine"])
def test_the_search_leaves_what_is_there_alone_and_says_so_before_it_begins(other, tmp_path, capsys):
    file = written(tmp_path)
    (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / other).write_text("mine")
    assert main(["tune", str(file), "-o", str(tmp_path / "out"), "--cache-dir", str(tmp_path.parent / "texts")]) == 2
    assert "output-exists" in capsys.readouterr().err and (tmp_path / other).read_text() == "mine"


@pytest.mark.slow
def test_a_preview_names_each_change_with_its_planned_time_and_size(tmp_path, capsys):
    file = written(tmp_path)
    assert main(["tune", str(file), "--explain", "--cache-dir", str(tmp_path.parent / "texts")]) == 0
    shown = capsys.readouterr().out
    assert "int4, group 32" in shown and "quantize.gptq" in shown and "MiB" in shown and "combinations" in shown
    named = ["tune", str(file), "--explain", "--cache-dir", str(tmp_path.parent / "texts"), "--candidate"]
    assert main([*named, "int8"]) == 0
    shown = capsys.readouterr().out
    assert "int8" in shown and "gptq" not in shown and "combinations" not in shown
    assert main([*named, "int9"]) == 2 and "did you mean `int8`?" in capsys.readouterr().err


@pytest.mark.slow
def test_of_several_open_pipelines_one_is_named(tmp_path, capsys):
    file = written(tmp_path)
    second = file.read_text().partition("pipeline fast")[2]
    file.write_text(
        file.read_text() + "pipeline small" + second.replace("fast", "small").replace("decode.p50", "bytes")
    )
    command = ["tune", str(file), "--explain", "--format", "json", "--cache-dir", str(tmp_path.parent / "texts")]
    assert main(command) == 3 and "open in several places" in capsys.readouterr().out
    assert main([*command, "--pipeline", "small"]) == 0
    answer = json.loads(capsys.readouterr().out)
    changes = {change["name"]: change for change in answer["preview"]}
    assert changes["int8"]["seconds"] > 0 and changes["int8"]["disk_bytes"] > 10**6 and answer["combinations"] > 100
    wish = read_wish(replace(open_session(file, cache_dir=tmp_path.parent / "texts", threads=1), pipelines=("small",)))
    closed = wish.text_with_step_replaced(
        ["best = prune.blocks(remove: 1, score: perplexity(text.calib))"], "weights: int8"
    )
    assert "search.steps" not in closed and "pipeline small" in closed and "fast" not in closed, closed


@pytest.mark.slow
def test_a_model_is_enough_for_a_preview(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bounds = ["--expect", "perplexity <= 1.02 * base", "--expect", "bytes <= 2MB"]
    assert main(["tune", "zoo:tiny-llama", "--explain", *bounds]) == 0
    assert "int8" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_wrong_bound_on_the_command_line_gets_a_caret(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "zoo:tiny-llama", "--expect", "perplexty <= 1.02 * base"]) == 3
    error = capsys.readouterr().err
    assert "^^^" in error and "perplexity" in error


@pytest.mark.parametrize(
    "options, location, marked",
    [
        (["--expect", "perplexty <= 1.02 * base"], "--expect:1:1", "perplexty"),
        (["--expect", "bytes <= 2MB", "--expect", "  perplexity <= -1"], "--expect:1:3", "perplexity <= -1"),
        (["--expect", "perplexity <= 1.02 * bse"], "--expect:1:22", "bse"),
        (["--expect", "perplexity <="], "--expect:1:12", "<="),
        (["--expect", "bytes <= 1KB"], "--expect:1:1", "bytes <= 1KB"),
        (["--optimize", "decode.p5"], "--optimize:1:1", "decode.p5"),
        (["--against", "perplexitty"], "--against:1:1", "perplexitty"),
        (["--within", "30 mins"], "--within:1:", ""),
        (["--for", "nativ"], "--for:1:1", "nativ"),
    ],
)
def test_a_mistake_in_an_option_is_placed_in_its_own_text(options, location, marked, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "zoo:tiny-llama", "--explain", *options]) == 3
    error = capsys.readouterr().err
    assert location in error and "command-line" not in error, error
    assert options[-1] != "bytes <= 1KB" or ("[unreachable-bound]" in error and error.count("error") == 1), error
    assert "^" * len(marked) in error and options[-1] in error, error


def test_two_options_that_contradict_are_both_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--expect", "bytes <= 3MB", "--expect", "bytes >= 10MB"]
    assert main(["tune", "zoo:tiny-llama", "--explain", *options]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("| ")[1] for line in lines if "| b" in line] == ["bytes >= 10MB", "bytes <= 3MB"]
    assert [line.split()[0] for line in lines if "--expect:1:1" in line] == ["-->", ":::"]


def test_a_file_of_text_that_is_missing_is_one_diagnostic_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "zoo:tiny-llama", "--data", "none.txt", "--explain"]) == 3
    error = capsys.readouterr().err
    assert error.count("none.txt") == 1 and "[no-file]" in error and "warning" not in error, error
    assert "paths are relative to the current folder" in error


def test_several_files_of_text_are_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("In the beginning was the word, and the word was short.\n" * 1_000)
    assert main(["tune", "zoo:tiny-llama", "--data", "*.txt", "--explain", "--candidate", "int8"]) == 0
    assert "int8" in capsys.readouterr().out


@pytest.mark.slow
def test_long_text_is_cut_into_rows_to_heal_on_and_short_text_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "In the beginning was the word, and the word was short.\n"
    for lines, candidate, code in ((12_000, HEALED, 0), (1_800, HEALED, 2), (1_800, "10 % pruned", 0)):
        (tmp_path / "mine.txt").write_text(line * lines)
        assert main(["tune", "zoo:tiny-llama", "--data", "mine.txt", "--explain", "--candidate", candidate]) == code
        assert ("tune.heal" in capsys.readouterr().out) == (candidate == HEALED and code == 0)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--expect", ""], "is empty"),
        (["--within", "30"], "write `30s`, `30min` or another unit of time"),
        (["--within", "30 min"], "write `30min`"),
        (["--expect", "bytes <= 120 MB"], "write `120MB`"),
        (["--within", "0min"], "write a time, such as `30min`"),
        (["--within", "1h30min"], "write `90min`"),
        (["--data", "short.txt"], "a search of steps needs 24576"),
    ],
)
def test_options_of_a_wish_that_mean_nothing_are_refused_at_once(options, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("In the beginning was the word. " * 100)
    assert main(["tune", "zoo:tiny-llama", "--explain", *options]) in (2, 3)
    error = capsys.readouterr().err
    assert sentence in error and error.count("error") == 1, error


def test_options_of_a_model_are_refused_beside_a_recipe(tmp_path, capsys):
    assert main(["tune", str(written(tmp_path)), "--for", "gguf", "--within", "1min"]) == 2
    assert "--for, --within: a recipe says that itself" in capsys.readouterr().err


def test_a_bound_on_the_command_line_is_one_bound(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = 'perplexity <= 1.5 * base } emit tuned { hf("evil") } expect tuned { bytes <= 4MB'
    assert main(["tune", "zoo:tiny-llama", "--explain", "--expect", text]) == 2
    assert "more than one thing" in capsys.readouterr().err
