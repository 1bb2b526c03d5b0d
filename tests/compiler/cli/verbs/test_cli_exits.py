"""Every way out of `effc` has its code of one table, and its sentence in one style."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import typer
from effc.compiler.artifacts.output_lock import OutputPath, outputs_locked_until_finished
from effc.compiler.cli.verbs.exit_codes import MEANINGS, diagnostics_of_exception, exit_codes_help_text
from effc.compiler.cli.verbs.flags import parse_duration
from effc.compiler.cli.verbs.output import exit_code_of
from effc.dsl.checker.recipe import Invocation
from effc.dsl.syntax.diagnostics import EXITS, Fault, Reject

from tests.grids import wide

SCRIPT = "import sys; from effc.compiler.cli.main import main; sys.exit(main())"


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


def ends_with(error: BaseException) -> tuple[str, int]:
    diagnostics = diagnostics_of_exception(error)
    return diagnostics[0].slug, exit_code_of(diagnostics)


def test_the_help_lists_every_exit_code(effc):
    run = effc("--help")
    assert run.code == 0 and set(MEANINGS) == set(EXITS)
    assert exit_codes_help_text() in run.out
    for code in EXITS.values():
        assert f"\n  {code:>3}  " in run.out


@pytest.mark.parametrize(
    ("error", "slug", "code"),
    [
        (ValueError("odd"), "internal", 1),
        (AssertionError(), "internal", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (MemoryError(), "no-memory", 6),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "no-memory", 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."), "no-memory", 6),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "no-space", 6),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no-space", 6),
        (RuntimeError("I/O error: File too large (os error 27)"), "no-space", 6),
        (OSError(errno.EFBIG, "File too large"), "no-space", 6),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "no-access", 5),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x/y"), "no-access", 5),
    ],
)
def test_an_exception_becomes_a_diagnostic_with_its_code(error, slug, code):
    assert ends_with(error) == (slug, code)


@pytest.mark.parametrize("name", [n for n in EXITS if n != "success"])
def test_a_reject_ends_with_the_code_of_its_first_error(name):
    error = Fault(f"test-{name}", "A fault of this test.", exit=name)("it is so")
    later = Fault("test-later-warning", "A warning of this test.", severity="warning")("mind this")
    assert exit_code_of(Reject(error, later).diagnostics) == EXITS[name]
    assert exit_code_of([later]) == 0


@pytest.mark.parametrize("verb", ["check", "compile", "new", "run", "serve", "pick", "report", "explain"])
def test_the_help_of_a_verb_lists_its_arguments_whichever_typer_is_there(effc, verb):
    run = effc(verb, "--help")
    assert run.code == 0 and not run.err
    assert run.out.startswith(f"Usage: effc {verb} [OPTIONS]") and "Arguments:" in run.out and "\\[" not in run.out


@pytest.mark.parametrize(
    ("args", "err"),
    [
        (("chek",), "error[usage]: unknown verb `chek`\nhelp: did you mean `check`, `cache`?\n"),
        (("check",), "error[usage]: missing argument `RECIPE...`\nhelp: `effc check --help` lists what it takes\n"),
        (("check", "r", "--fromat", "json"), "error[usage]: unknown option --fromat\nhelp: did you mean --format?\n"),
        (
            ("check", "r", "--format", "md"),
            "error[usage]: `--format md` is not known here: text, json, github\n"
            "help: `effc check --help` lists what it takes\n",
        ),
        (("check", "r", "--max-memory", "3flops"), "`3flops` is no size: write a number and a unit"),
        (("check", "r", "--max-memory", "0"), "`0` is no size"),
        (("check", "r", "--max-memory", "9" * 400), f"`{'9' * 40}` is no size"),
        (("compile", "r", "--max-time", "9" * 400 + "h"), f"`{'9' * 40}` is no time"),
        (("check", "r", "--set", "keep"), "`--set` takes NAME=VALUE, such as --set keep=80%"),
        (("inspect", "zoo:tiny-llama", "--format", "dot"), "`--format dot` draws one layer: add --graph UNIT"),
    ],
)
def test_a_wrong_flag_or_argument_is_exit_2_in_the_same_style(effc, args, err):
    run = effc(*args)
    assert (run.code, run.out) == (2, "") and err in run.err
    assert "Traceback" not in run.err and "Usage:" not in run.err


def test_a_time_without_a_unit_is_told_what_to_write():
    with pytest.raises(typer.BadParameter, match="`5` has no unit: write 5s, 5m or 5h"):
        parse_duration("5")
    assert (parse_duration("90s"), parse_duration("30m"), parse_duration("0.5h")) == (90.0, 1800.0, 1800.0)


def test_a_usage_error_is_json_where_json_was_asked_for(effc):
    run = effc("check", "--format", "json")
    body = json.loads(run.out)
    assert (run.code, run.err) == (2, "")
    assert (body["status"], body["exit"], body["diagnostics"][0]["slug"]) == ("error", 2, "usage")


@pytest.mark.parametrize("verb", ["compile", "plan", "test"])
def test_events_that_can_not_be_written_are_refused_before_anything_is_computed(effc, write, verb):
    run = effc(verb, write(), "--events", "away/events.jsonl")
    assert run.code == 2 and "there is no folder away" in " ".join(run.err.replace("│", " ").split())


@pytest.mark.slow
def test_a_second_compile_into_a_place_is_refused_before_it_computes(effc, write, tmp_path):
    recipe = write()
    with outputs_locked_until_finished([OutputPath(tmp_path / "out", Invocation("hf", {"path": "small"}))], False):
        run = effc("compile", recipe, "--no-progress", "--cache-dir", "cache")
    assert run.code == 2 and "error[output-busy]" in run.err and "r.effspec:" in run.err
    assert not list((tmp_path / "cache").rglob("steps/*"))  # nothing was computed
    assert not (tmp_path / "out").exists()


def test_what_fills_the_cache_is_freed_by_its_verb_and_what_was_named_is_not(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cache" / "x"))
    assert "cache gc" in diagnostics_of_exception(full, tmp_path / "cache")[0].help
    assert "cache gc" not in diagnostics_of_exception(full, tmp_path / "other")[0].help


def test_a_traceback_is_shown_only_with_debug(effc, write):
    recipe = write()
    events = ("--events", ".")  # a folder: opening it breaks inside the command
    quiet, loud = effc("compile", recipe, *events), effc("compile", recipe, *events, "--debug")
    assert quiet.code == loud.code == 5
    assert "Traceback" not in quiet.err and "is a directory" in quiet.err
    assert "Traceback" in loud.err and "IsADirectoryError" in loud.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_exit_6(process, write):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", SCRIPT, "passes"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 6
    assert done.stderr == (
        "error[no-space]: the disk is full\n"
        "help: make room on its disk; if the cache is on it, `effc cache gc` frees what is no longer used\n"
    )


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -c '{SCRIPT}' passes --all | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_outside_its_range_is_exit_5_before_work_starts(process, write, tmp_path):
    old = tmp_path / "site" / "transformers-4.57.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    run = process("compile", write(), PYTHONPATH=str(tmp_path / "site"))
    assert (run.code, run.out) == (5, "")
    assert run.err == (
        "error[package-version]: transformers 4.57.1 is installed, effc needs >=5.24,<6\n"
        'help: pip install "transformers>=5.24,<6"\n'
    )
    doctor = process("doctor", PYTHONPATH=str(tmp_path / "site"))
    told = " ".join(doctor.out.split())  # the columns are as wide as the longest of what is installed
    assert doctor.code == 5 and "missing transformers 4.57.1, needs >=5.24,<6" in told


@pytest.mark.parametrize("verb", ["plan", "compile", "run", "test", "inspect"])
def test_a_device_that_is_not_here_is_refused_before_work(effc, write, verb):
    place = "zoo:tiny-llama" if verb in ("run", "inspect") else write()
    unknown, missing = effc(verb, place, "--device", "abacus"), effc(verb, place, "--device", "cuda:99")
    assert (unknown.code, unknown.out) == (2, "") and "torch knows no device `abacus`" in unknown.err
    assert (missing.code, missing.out) == (
        5,
        "",
    ) and "error[device-missing]: there is no device `cuda:99`" in missing.err


@pytest.mark.slow
@pytest.mark.parametrize("flag", [("--offline",), ()])
def test_a_hub_out_of_reach_is_exit_8(process, write, flag):
    run = process("plan", write(model='hf("no/such")'), *flag, HF_ENDPOINT="http://127.0.0.1:9")
    assert run.code == 8 and "error[hub-unreachable]" in run.err


@pytest.mark.slow
def test_an_interrupt_while_torch_is_imported_ends_the_process_and_is_not_raised_into_the_import(tmp_path):
    script = """
import os, signal, sys, time
from effc.compiler.cli.verbs.interrupt import raise_or_exit_on_signal

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._tensor":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
with raise_or_exit_on_signal():
    try:
        import torch
    except BaseException as error:
        print("broken off by", type(error).__name__)
    time.sleep(30)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (run.returncode, run.stdout) == (130, "") and run.stderr.startswith("note[interrupted]: stopped"), run.stderr


@pytest.mark.slow
def test_an_interrupt_in_a_callback_where_python_can_not_raise_ends_the_process_without_a_trace(tmp_path):
    script = """
import os, signal, time, weakref
from effc.compiler.cli.verbs.interrupt import raise_or_exit_on_signal, stop_sentence

class Thing: pass

def callback(_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass

with raise_or_exit_on_signal(stop_sentence(["serve", "model"])):
    thing = Thing()
    reference = weakref.ref(thing, callback)
    del thing
    time.sleep(30)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (run.returncode, run.stderr) == (130, "note[interrupted]: stopped\n")


def test_only_a_verb_that_can_go_on_says_so_when_it_is_stopped():
    for verb, goes_on in (("compile", True), ("tune", True), ("serve", False), ("run", False)):
        (diagnostic,) = diagnostics_of_exception(KeyboardInterrupt(), argv=[verb, "x"])
        assert ("goes on where it was stopped" in diagnostic.message) is goes_on


@pytest.mark.parametrize("number", wide([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], {signal.SIGINT}))
def test_an_interrupt_ends_at_once_and_leaves_nothing_half_written(write, tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("whoever began the tests ignores the signal, as nohup does, and so does what they begin")
    recipe = write("  slim = prune.blocks(remove: 9, score: perplexity(heldout))", file=f"{number}.effspec")
    events = tmp_path / "events.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "compile", str(recipe), "--events", str(events)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (events.exists() and "Ticked" in events.read_text()):
        assert child.poll() is None and time.monotonic() < deadline, "the compile did not begin to score"
        time.sleep(0.05)
    child.send_signal(number)
    scored = events.read_text().count("Ticked")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.endswith(
        "note[interrupted]: stopped; nothing is half written, and the same command goes on where it was stopped\n"
    )
    assert events.read_text().count("Ticked") <= scored + 2  # what was being scored, and no more
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_compile_that_was_killed_between_two_artifacts_is_compiled_again_without_force(write, tmp_path, effc):
    recipe = write("  thin = prune.channels(keep: 75% of channels, align: 32)", file="two.effspec")
    recipe.write_text(recipe.read_text().replace('hf("small")', 'hf("small") hf("other")'))
    first = tmp_path / "out" / "small"
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, "compile", str(recipe), "-q"], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / ".small.effc-unfinished").exists():
        assert child.poll() is None and time.monotonic() < deadline, "nothing was put into place"
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert (first / "manifest.json").is_file() and not (tmp_path / "out" / "other").exists()
    shutil.copy(recipe, tmp_path / "another.effspec")
    assert "error[output-exists]" in effc("compile", "another.effspec", "-q").err  # it is not that one's
    assert effc("compile", "two.effspec", "-q").code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["other", "small"]
    assert "error[output-exists]" in effc("compile", "two.effspec", "-q").err  # the whole was done


@pytest.mark.parametrize("verb", ["cache", "bench", "federate"])
def test_a_group_of_verbs_alone_shows_them(effc, verb):
    run = effc(verb)
    assert (run.code, run.err) == (0, "") and f"Usage: effc {verb}" in run.out and "\nCommands:\n" in run.out


UNFIT = ["", "0", "-1", "1.5", "many", "1025", "ray:", "ray:here", "ray::6379", "ray:here:0", "ray:here:99999"]


@pytest.mark.parametrize("word", UNFIT)
def test_workers_that_are_none_are_refused_before_the_recipe_is_read(effc, word):
    run = effc("compile", "nowhere.effspec", f"--workers={word}")
    assert (run.code, run.out) == (2, "") and run.err.startswith("error[unknown-workers]: `--workers")


def test_a_place_that_is_taken_is_refused_before_torch_is_imported(write, tmp_path):
    recipe = write()
    (tmp_path / "out/small").mkdir(parents=True)
    code = f"""
import sys
from effc.compiler.cli.main import main
code = main(["compile", {str(recipe)!r}])
sys.exit(99 if "torch" in sys.modules else code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error[output-exists]: out/small exists" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "words",
    [("compile", "bad.effspec"), ("plan", "bad.effspec"), ("run", "nowhere", "--prompt", "a"), ("serve", "nowhere")],
)
def test_mistakes_that_need_no_torch_are_said_before_it_is_imported(tmp_path, words):
    (tmp_path / "bad.effspec").write_text(
        'effspec 1\nmodel m = zoo("tiny-llama")\npipeline p(m) { s = prune.chanels() }\n'
    )
    code = f"""
import sys
from effc.compiler.cli.main import main
code = main({[*words]!r})
sys.exit(99 if "torch" in sys.modules else code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode in (2, 3) and "error[" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("run", "zoo:tiny-llama", "--prompt", "a", "--temperature", "nan"),
        ("cache", "gc", "--older-than", "nan"),
        ("bench", "kernels", "--seconds", "nan"),
        ("serve", "zoo:tiny-llama", "--rate", "nan"),
        ("serve", "zoo:tiny-llama", "--timeout", "nan"),
    ],
)
def test_what_is_no_number_is_no_fraction_of_a_flag(effc, words):
    run = effc(*words)
    assert (run.code, run.out) == (2, "") and "error[usage]" in run.err


@pytest.mark.parametrize("threads", ["0", "1025", "99999999999"])
def test_more_threads_than_any_machine_has_are_refused_before_they_start(effc, threads):
    run = effc("doctor", "--threads", threads)
    assert (run.code, run.out) == (2, "") and "1<=x<=1024" in run.err
