"""explain, passes, recipes: what effc has to offer, and modules of the library in a recipe."""

import json

from effc.compiler.plugin.library_effects import Effect, Effects
from effc.compiler.plugin.recipe_library import library_files


def test_explain_has_a_page_for_words_and_for_diagnostics(effc):
    assert "prune.blocks" in effc("explain", "prune.blocks").out
    assert "ends with exit code 4" in effc("explain", "expectation-missed").out
    near = effc("explain", "unknwon-name")
    assert near.code == 2 and "did you mean `unknown-name`?" in near.err


def test_passes_lists_every_file_of_the_shelf(effc):
    names = [line.split()[0] for line in effc("passes").out.splitlines()]
    assert "prune.channels" in names and names == sorted(names)
    everything = json.loads(effc("passes", "--all", "--format", "json").out)
    assert {"passes", "targets", "metrics", "data", "models"} <= set(everything)


def test_recipes_lists_the_library_with_its_sentences(effc):
    out = effc("recipes").out
    assert library_files() and all(
        name.removesuffix(".effspec") in out and recipe.sentence in out for name, recipe in library_files().items()
    )
    assert "papers/shears/sparse-50" in effc("recipes", "search", "Shears", "50%").out
    assert effc("recipes", "search", "no-such-word").code == 2


def test_what_a_recipe_gave_is_told_with_its_machine_and_what_was_not_measured_says_so(effc):
    effects, named = Effects.read(), {name.removesuffix(".effspec"): r for name, r in library_files().items()}
    known = next(r for r in named.values() if effects.effects_of_recipe(r))
    unknown = [
        r for r in named.values() if not r.is_module and not effects.effects_of_recipe(r)
    ]  # none once all were measured
    listed = effc("recipes")
    assert known.sentence + "\n  " + effects.effects_of_recipe(known)[0].text() + "\n" in listed.out
    assert listed.out.count("\n  not measured\n") == len(unknown)
    assert f"measured on {effects.machine_and_versions_text(effects.effects_of_recipe(known)[0])}" in listed.err
    shown = effc("recipes", "show", known.name)
    assert shown.out == known.text and effects.effects_of_recipe(known)[0].table() in shown.err
    assert all("not measured" in effc("recipes", "show", r.name).err for r in unknown[:1])
    rows = json.loads(effc("recipes", "--format", "json").out)["recipes"]
    told = {row["name"]: row.get("effects") for row in rows}
    assert all(told[r.name] == [] for r in unknown) and told["std.text"] is None
    assert told[known.name][0]["rows"] and told[known.name][0]["machine"]["cpu"]


def test_a_front_is_told_by_its_reach_and_shown_choice_by_choice_and_the_family_behind_it_is_not_told_again():
    def rows(artifact: str) -> list:
        return [
            (artifact, "params of one", "params", 2e6, 2e6),
            (artifact, "params of two", "params", 2e6, 1e6),
            (f"{artifact}/one", "params", "params", None, 2e6),
            (f"{artifact}/one", "perplexity(dev)", "", None, 30.0),
            (f"{artifact}/two", "perplexity(dev)", "", None, 40.5),
        ]

    front = Effect("tiny", machine=0, seed=0, seconds=1.0, rows=(*rows("sizes"), *rows("sizes-shared")))
    assert front.text() == "tiny: 2 choices: params 1.00 M to 2.00 M (was 2.00 M), perplexity(dev) 30 to 40.5"
    assert front.table().splitlines() == [
        "tiny",
        "  sizes     params  perplexity(dev)",
        "  original  2.00 M",
        "  one       2.00 M  30",
        "  two       1.00 M  40.5",
    ]
    other = ("lean", "params", "params", 2e6, 1e6)
    both = Effect("tiny", machine=0, seed=0, seconds=1.0, rows=(*rows("sizes"), other))
    assert both.text().endswith("40.5; lean: params 2.00 M -> 1.00 M (-50.0 %)")
    assert both.table().endswith("  lean    original  compiled\n  params  2.00 M    1.00 M    -50.0 %")


def test_a_recipe_is_copied_with_its_files_and_compiled_by_name(effc, tmp_path):
    assert effc("recipes", "copy", "papers/rttc/ttt-32").out == "papers/rttc/ttt-32.effspec\n"
    assert (tmp_path / "zoo" / "tiny-llama" / "calib.txt").is_file()
    assert effc("check", "papers/rttc/ttt-32.effspec").code == 0
    again = effc("recipes", "copy", "papers/rttc/ttt-32")
    assert again.code == 2 and "error[recipe-there]" in again.err
    assert effc("check", "quickstart").out.startswith("ok: ")  # by name, where there is no such file
    for verb in (("lock", "quickstart"), ("test", "quickstart", "--bless")):
        run = effc(*verb)
        assert run.code == 2 and "effc recipes copy quickstart" in run.err


def test_a_recipe_of_the_library_is_printed_and_explained(effc):
    module = library_files()["std.text"]
    assert effc("recipes", "std.text").out == module.path.read_text()
    assert json.loads(effc("recipes", "std.text", "--format", "json").out)["text"] == module.path.read_text()
    assert "  prune.lean(keep, remove, align, score)\n" in effc("explain", "std.prune").out
    for verb in ("recipes", "explain"):
        run = effc(verb, "std.txt")
        assert (run.code, run.out) == (2, "") and "did you mean `std.text`?" in run.err


def test_a_verb_is_told_from_words_and_what_it_refuses_names_its_own_help(effc):
    assert "`effc pick --help`" in effc("explain", "pick").out
    run = effc("inspect", "nowhere", "--format", "svg")
    assert run.code == 2 and "`nowhere` is none" in run.err and "`effc inspect --help`" in run.err


def test_a_fault_inside_a_module_shows_who_called_it(effc, write, tmp_path):
    path = write("  slim = prune.shallow(layers: 8)")
    (tmp_path / path).write_text((tmp_path / path).read_text().replace("model", "use std.prune\nmodel", 1))
    run = effc("check", path)
    assert run.code == 3 and "error[leaves-none]: `remove: 8` leaves none of 8 layers" in run.err
    assert "std/prune.effspec:" in run.err
    assert "::: r.effspec:" in run.err and "---- called here" in run.err


def test_a_module_of_the_library_brings_texts_from_its_own_folder(effc, write, tmp_path):
    path = write(
        "  slim = prune.blocks(remove: 1, score: perplexity(text.calib))",
        "expect small {\n  perplexity(text.heldout) <= 3 * base\n}\n",
    )
    (tmp_path / path).write_text((tmp_path / path).read_text().replace("model", "use std.text\nmodel", 1))
    assert effc("check", path).out == "ok: small: 1 step, 1 artifact, 1 bound\n"
    assert "slim = prune.blocks" in effc("plan", path).out
