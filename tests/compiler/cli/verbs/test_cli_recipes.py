"""check, fmt, explain, passes, recipes: exact output, and what they make of input that is no recipe."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name


@pytest.fixture
def sound(write):
    """A recipe of which there is nothing to say."""
    return write(
        "  slim = prune.blocks(remove: 1, score: perplexity(calib))",
        "expect small {\n  perplexity(heldout) <= 2 * base\n}\n",
    )


def test_a_sound_recipe_is_one_line(effc, sound):
    run = effc("check", sound)
    assert (run.code, run.out, run.err) == (0, "ok: small: 1 step, 1 artifact, 1 bound\n", "")
    assert effc("check", sound, "-q").out == ""


def test_several_recipes_are_named(effc, sound):
    run = effc("check", sound, sound)
    assert run.out == 2 * f"ok: {sound}: small: 1 step, 1 artifact, 1 bound\n"


def test_variants_of_a_matrix_are_counted(effc, write, tmp_path):
    path = write(
        "  slim = prune.blocks(remove: cut, score: perplexity(calib))",
        "expect small {\n  perplexity(heldout) <= 2 * base\n}\n",
    )
    text = (tmp_path / path).read_text()
    text = text.replace("\nmodel base", "\nparam cut: int = 1\nmatrix cut: [1, 2, 3]\n\nmodel base", 1)
    (tmp_path / path).write_text(text)
    assert effc("check", path).out == "ok: small: 1 step, 1 artifact, 1 bound, 3 variants\n"


def test_the_answer_as_json_is_one_object_on_stdout(effc, sound):
    run = effc("check", sound, "--format", "json")
    body = json.loads(run.out)
    assert run.err == "" and body == {
        "schema_version": 1,
        "verb": "check",
        "status": "ok",
        "exit": 0,
        "diagnostics": [],
        "recipes": [{"path": str(sound), "pipeline": "small", "steps": 1, "artifacts": 1, "bounds": 1, "variants": 1}],
    }


def test_all_mistakes_are_told_at_once_with_a_caret(effc, write):
    path = write("  thin = prune.channels(keep: 75% of chanels)\n  slim = prune.bloks(remove: 1)")
    run = effc("check", path)
    assert (run.code, run.out) == (3, "")
    assert "error[wrong-base]" in run.err and "did you mean `prune.blocks`?" in run.err
    assert "  --> r.effspec:8:38\n" in run.err and f"     | {' ' * 37}^^^^^^^\n" in run.err


def test_github_annotations_go_to_stdout(effc, write):
    path = write("  thin = prune.channels(keep: 75% of chanels)")
    lines = effc("check", path, "--format", "github").out.splitlines()
    assert any(line.startswith("::error file=r.effspec,line=8,col=38,") for line in lines)


def test_fix_writes_what_is_sure_and_checks_again(effc, write, tmp_path):
    path = write("  thin = prune.channels(keep: 75% of chanels)")
    run = effc("check", path, "--fix")
    assert (run.code, run.err) == (0, "fixed 1 mistake in r.effspec\n")
    assert run.out == "ok: small: 1 step, 1 artifact, 0 bounds\n"
    assert "of channels)" in (tmp_path / path).read_text()


def test_a_recipe_becomes_json_and_a_recipe_again(effc, sound, tmp_path):
    text = effc("fmt", "--to", "effspec", sound)
    tree = effc("fmt", "--to", "json", sound)
    assert (text.code, text.err, tree.code, tree.err) == (0, "", 0, "")
    assert json.loads(tree.out)["doc"] == "A recipe of the tests."
    (tmp_path / "r.json").write_text(tree.out)
    assert effc("fmt", "--to", "effspec", "r.json").out == text.out
    assert effc("fmt", "--to", "effspec", "-", stdin=tree.out).out == text.out
    assert effc("fmt", "--to", "json", "r.json").out == tree.out


def test_comments_that_the_json_form_leaves_out_are_counted(effc, sound, tmp_path):
    path = tmp_path / sound
    path.write_text(path.read_text() + "# one\n\n# another\n")
    run = effc("fmt", "--to", "json", sound)
    assert (run.code, run.err) == (0, "left out 2 comments: the JSON form has none\n")
    assert effc("fmt", "--to", "json", sound, "-q").err == "" and json.loads(run.out)["comments"] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "error[json-form]: this is no JSON: expecting value"),
        ('{"format": 1,}', "  --> x.json:1:1"),  # from Python 3.13 on at the comma
        ("[" * 100_000, "error[json-form]: `x.json` is nested too deep"),
        ("[]", '`$` is a list, where an object with `"format": 1` is expected'),
        (
            '{"format": 1, "statements": [{"node": "Step"}]}',
            "`$.statements[0]` is a node `Step`, where a statement is expected",
        ),
        ('{"format": 1, "edition": 9, "statements": []}', "this effc reads edition 1 of the language, not 9"),
    ],
)
def test_json_that_is_no_recipe_is_refused(effc, tmp_path, content, said):
    (tmp_path / "x.json").write_text(content)
    run = effc("fmt", "--to", "effspec", "x.json")
    assert (run.code, run.out) == (3, "") and said in run.err


def test_fmt_prints_one_file_in_a_form_that_there_is(effc, sound):
    for args in (("--to", "yaml", sound), ("--to", "json", sound, sound), ("--to", "json", "--check", sound)):
        run = effc("fmt", *args)
        assert (run.code, run.out) == (2, "") and "`--to" in run.err


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (None, 2, "error[no-recipe]: there is no file `x.effspec`"),
        (b"", 3, "the file has no statements"),
        (b"effspec 9\n", 3, "this effc reads edition 1 of the language, not 9"),
        (b"hello\n", 3, "the file does not start with `effspec 1`"),
        (b"effspec 1\n", 3, "error[empty-recipe]"),
        (bytes(range(256)) * 40, 3, "error[binary-recipe]: `x.effspec` is a binary file"),
        (b"\n# a remark\n", 3, "the file has no statements"),
        (b"effspec 1\n\xff\xfe\n", 3, "error[not-utf-8]"),
        (b"effspec 1\n" + b')c](0%0.}(0a."a%][(:aaa\n' * 5_000, 3, "error[not-opened]: `)` closes nothing"),
        (b"effspec 1\n" + b"(x = [" * 170_000, 3, "error[recipe-too-large]"),
        (b"effspec 1\n" + b"x = (" * 20_000, 3, "error["),
    ],
)
@pytest.mark.parametrize("verb", ["check", "plan", "compile", "fmt"])
def test_what_is_no_recipe_is_refused_in_a_sentence(effc, tmp_path, verb, content, code, said):
    if verb == "fmt" and content == b"effspec 1\n":
        pytest.skip("an empty recipe has a format")
    if content is not None:
        (tmp_path / "x.effspec").write_bytes(content)
    run = effc(verb, "x.effspec")
    assert run.code == code, run.err
    assert said.removesuffix("]") in run.err or said in run.err
    assert run.out == "" and "Traceback" not in run.err


@pytest.mark.parametrize("content", [b"", b"\n", b"effspec 2\nthing base = [zoo]\n", b"effspec 1\nmodel base = zoo(\n"])
def test_what_can_not_be_read_is_one_mistake_not_several(effc, tmp_path, content):
    (tmp_path / "x.effspec").write_bytes(content)
    run = effc("check", "x.effspec")
    assert run.code == 3 and run.err.count("error[") == 1 and "warning" not in run.err


@pytest.mark.parametrize(
    ("amount", "said"), [("remove: 99% of params", "out-of-reach"), ("remove: 9% of params, group: 5000", "too-coarse")]
)
def test_what_only_the_plan_can_refuse_has_a_place_as_well(effc, write, amount, said):
    run = effc("plan", write(f"  slim = prune.multi({amount}, score: perplexity(calib))"))
    assert run.code == 3 and f"error[{said}]" in run.err
    assert f"slim = prune.multi({amount}" in run.err and "^^^" in run.err


def test_a_lost_line_leaves_nothing_unused(effc, write):
    run = effc("check", write("  slim = prune.blocks(remove: 1, score perplexity(calib))"))
    assert run.code == 3 and run.err.count("error[") == 1, run.err
    assert "error[wrong-sign]: a `:` is missing after `score`" in run.err and "unused" not in run.err


@pytest.mark.slow
def test_a_model_of_the_hub_is_not_fetched_to_be_checked(process, write):
    path = write("  thin = prune.channels(keep: 75% of channels, aling: 32)", model='hf("no/such")')
    run = process("check", path, HF_ENDPOINT="http://127.0.0.1:9")
    assert run.code == 3 and "did you mean `align`?" in run.err and "hub" not in run.err
    assert "note[unseen-model]: this model was not looked at yet" in run.err
    assert "help: `effc plan` looks at it and finds what is wrong" in run.err


def test_a_model_that_is_not_there_is_one_fault_among_the_others(effc, write):
    run = effc("check", write("  thin = prune.channels(keep: 75% of channels, aling: 32)", model='hf("./none")'))
    assert run.code != 0 and "did you mean `align`?" in run.err
    assert 'error[no-model]: hf("./none"): there is no folder none\n  --> r.effspec:4:14' in run.err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ('hf("/dev/null")', 'hf("/dev/null"): /dev/null is a device, where a folder is needed'),
        ('hf("./r.effspec")', 'hf("./r.effspec"): r.effspec is a file, where a folder is needed'),
        ('config("/dev/null")', 'config("/dev/null"): /dev/null is a device, where a file is needed'),
    ],
)
def test_what_lies_there_instead_of_a_model_is_named(effc, write, model, said):
    run = effc("check", write("  thin = prune.channels(keep: 75% of channels)", model=model))
    assert run.code == 5 and f"error[no-model]: {said}" in run.err


def test_a_cache_that_is_a_file_is_refused_before_anything_runs(effc, write):
    path = write("  thin = prune.channels(keep: 75% of channels)")
    run = effc("plan", path, "--cache-dir", path)
    assert run.code == 2 and f"the cache is a folder, and {path} is a file" in run.err and not run.out


AS_USER = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")


def test_a_recipe_that_the_system_does_not_hand_out_is_refused(effc):
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("this system has no file that is there and gives an error")
    run = effc("check", "/proc/self/mem")
    assert run.code == 2 and run.err.startswith(
        "error[unreadable-recipe]: `/proc/self/mem` cannot be read: input/output"
    )


@AS_USER
def test_a_recipe_without_permission_is_refused(effc, sound, tmp_path):
    (tmp_path / sound).chmod(0)
    run = effc("check", sound)
    assert run.code == 2 and run.err == "error[unreadable-recipe]: `r.effspec` cannot be read: permission denied\n"


@AS_USER
def test_fmt_says_where_it_may_not_write(effc, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "u.effspec").write_text('effspec 1\nmodel   base = zoo("tiny-llama")\n')
    folder.chmod(0o555)
    run = effc("fmt", "closed/u.effspec")
    assert run.code == 5 and run.err.startswith("error[no-access]: no permission: ") and "closed" in run.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no params file `p.json`"),
        (b"{", "the params file is no JSON"),
        (b"[1]", "the params file holds no object"),
        (b"\x00\x01", "`p.json` is a binary file"),
        (b'{"keep": "caf\xe9"}', "byte 14 of `p.json` (line 1, column 14) is not UTF-8"),
        (b'{"kep": "80%"}', "the recipe has no param `kep`"),
    ],
)
def test_a_params_file_that_is_none_is_a_mistake_of_the_command_line(effc, sound, tmp_path, content, said):
    if content is not None:
        (tmp_path / "p.json").write_bytes(content)
    run = effc("check", sound, "--params", "p.json")
    assert (run.code, run.out) == (2, "") and said in run.err and ".effspec" not in run.err


def test_every_unknown_value_from_outside_is_told(effc, sound):
    run = effc("check", sound, "--set", "a=1", "--set", "b=2")
    assert run.code == 2 and all(f"the recipe has no param `{name}`" in run.err for name in "ab")


def test_a_folder_is_no_recipe(effc, sound):
    run = effc("check", ".")
    assert run.code == 2 and "`.` is a folder" in run.err and "r.effspec" in run.err


def test_fmt_writes_one_style_and_then_leaves_it(effc, tmp_path):
    path = tmp_path / "u.effspec"
    path.write_text('effspec 1\nmodel   base=zoo( "tiny-llama" )  # kept\npipeline p(base){}\nemit p{hf("o")}\n')
    before = path.read_text()
    assert effc("fmt", "--check", path).code == 3 and path.read_text() == before
    diff = effc("fmt", "--diff", path)
    assert diff.code == 0 and "+model base = zoo" in diff.out and path.read_text() == before
    run = effc("fmt", path)
    assert (run.code, run.out, run.err) == (0, "", f"formatted {path}\n")
    assert "# kept" in path.read_text()
    assert effc("fmt", "--check", path).err == "1 file in style\n"
    assert effc("fmt", "-", stdin=before).out == path.read_text()


def test_colours_obey_the_flag_and_the_environment(effc, sound, monkeypatch):
    assert "\x1b[32mok" in effc("check", sound, "--color", "always").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32mok" in effc("check", sound).out
    assert "\x1b" not in effc("check", sound, "--color", "never").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in effc("check", sound).out


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("check", "--help"),
        ("check", "r.effspec"),
        ("fmt", "--check", "r.effspec"),
        ("passes",),
        ("recipes",),
        ("explain", "prune.blocks"),
    ],
)
@pytest.mark.slow
def test_what_needs_no_torch_takes_four_times_its_libraries_at_most(write, tmp_path, args):
    write()
    script = (
        "import sys; from effc.compiler.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch'; assert 'transformers' not in sys.modules; sys.exit(0)"
    )
    spent, libraries = [], []
    for _ in range(3):  # the least of three: others share the processor's caches
        spent.append(_processor_seconds(script, args, tmp_path))
        libraries.append(_processor_seconds("import lark, typer.main, pydantic.types", (), tmp_path))
    # About half a second at rest; processors differ and are shared, so the libraries' own imports say what that is.
    assert min(spent) < max(0.5, 4 * min(libraries)), f"{min(spent):.2f} s, libraries {min(libraries):.2f} s"


def _processor_seconds(script, args, folder) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=folder, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_new_writes_a_recipe_that_checks(effc, tmp_path):
    for goal in ("smaller", "faster", "gentle", "search", "federated", "rttc"):
        run = effc("new", "--goal", goal)
        path = Path(run.out.strip())
        assert run.code == 0 and path.name == f"tiny-llama-{goal}.effspec"
        checked = effc("check", path)
        assert (checked.code, checked.err) == (0, ""), checked.err
        assert effc("fmt", "--check", path).code == 0


@pytest.mark.slow
def test_new_names_a_folder_as_the_recipe_sees_it(effc, tmp_path):
    shutil.copytree(zoo_folders_by_name()["tiny-llama"], tmp_path / "models" / "mine")
    (tmp_path / "recipes").mkdir()
    for out, name in (
        ("a.effspec", "./models/mine"),
        ("recipes/b.effspec", "../models/mine"),
        ("models/mine/c.effspec", "."),
    ):
        assert effc("new", tmp_path / "models" / "mine", "-o", out).code == 0
        text = (tmp_path / out).read_text()
        assert f'model base = hf("{name}")' in text and str(tmp_path) not in text and 'native("mine-small")' in text
        assert effc("check", out).code == 0


@pytest.mark.slow
def test_a_folder_with_a_quote_in_its_name_is_named_in_a_new_recipe_as_it_is(effc, tmp_path):
    shutil.copytree(zoo_folders_by_name()["tiny-llama"], tmp_path / 'we"ird')
    assert effc("new", 'we"ird', "-o", "r.effspec").code == 0
    assert 'hf("./we\\"ird")' in (tmp_path / "r.effspec").read_text() and effc("check", "r.effspec").code == 0
    assert (
        'the zoo has no `a" ) pipeline x(base) {`' in effc("new", 'zoo:a" ) pipeline x(base) {', "-o", "s.effspec").err
    )


def test_new_overwrites_nothing_and_knows_its_goals(effc, tmp_path):
    (tmp_path / "mine.effspec").write_text("mine")
    run = effc("new", "-o", "mine.effspec")
    assert run.code == 2 and run.err.startswith("error[file-exists]: mine.effspec exists\n")
    assert (tmp_path / "mine.effspec").read_text() == "mine"
    assert "goals are smaller, faster, gentle" in effc("new", "--goal", "bigger").err
    assert effc("new", "nowhere/at/all").code == 2


@pytest.mark.parametrize("content", [b"root:x:0:0\n", b"effspec 1\nroot:x:0:0\n", b"\xff\xferoot", b"\0root", b""])
@pytest.mark.parametrize("link", [False, True], ids=["by path", "by a link"])
def test_nothing_is_shown_of_a_file_outside_the_recipes_folder_that_is_no_recipe(effc, tmp_path, content, link):
    (tmp_path / "secret").write_bytes(content)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "secret")
    text = f'effspec 1\nuse "{"link" if link else "../secret"}" as p\nmodel base = zoo("tiny-llama")\n'
    steps = 'pipeline s(base) { thin = prune.channels(keep: 75% of channels) }\nemit s { hf("s") }\n'
    (tmp_path / "inside" / "r.effspec").write_text(text + steps)
    run = effc("check", "inside/r.effspec")
    assert run.code == 3 and "error[foreign-module]" in run.err and "root" not in run.err
    assert "root" not in effc("check", "inside/r.effspec", "--format", "json").out


def test_a_module_whose_path_no_system_has_is_not_there(effc, tmp_path):
    (tmp_path / "long.effspec").write_text(f'effspec 1\nuse "./{"a" * 5000}.effspec" as x\n')
    run = effc("check", "long.effspec")
    assert run.code == 3 and "unknown-module" in run.err and "long.effspec:2:5" in run.err
