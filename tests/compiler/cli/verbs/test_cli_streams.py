"""Readers of stdout and stderr that leave, as `| head -1` does: the work goes on, and its exit code stands."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = "import sys; from effc.compiler.cli.main import main; sys.exit(main())"
MISSED = "expect small {\n  params <= 0.1 * base\n}\n"


@pytest.fixture
def unread():
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def run(tmp_path):
    def start(*args, **streams):
        command = [sys.executable, "-c", SCRIPT, *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, timeout=120, text=True, **streams)

    return start


@pytest.mark.slow
def test_a_compile_whose_words_nobody_reads_leaves_its_artifact(run, write, tmp_path, unread):
    done = run("compile", write(), "-o", "o", stdout=subprocess.PIPE, stderr=unread)
    assert done.returncode == 0 and "small -> o/small" in done.stdout
    assert (tmp_path / "o/small/manifest.json").is_file()


@pytest.mark.slow
def test_a_compile_whose_answer_nobody_reads_leaves_its_artifact(run, write, tmp_path, unread):
    done = run("compile", write(), "-o", "o", stdout=unread, stderr=subprocess.PIPE)
    assert done.returncode == 0 and "Broken pipe" not in done.stderr
    assert (tmp_path / "o/small/manifest.json").is_file()


@pytest.mark.slow
def test_a_missed_bound_is_exit_4_though_nobody_reads_it(run, write, unread):
    assert run("compile", write(expect=MISSED), stdout=unread, stderr=unread).returncode == 4


@pytest.mark.parametrize("form", ["text", "json", "github"])
def test_a_refused_recipe_is_exit_3_though_nobody_reads_it(run, write, unread, form):
    recipe = write("  thin = prune.chanels(keep: 75% of channels)")
    assert run("check", recipe, "--format", form, stdout=unread, stderr=unread).returncode == 3


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_refused_recipe_is_exit_3_though_its_words_fit_no_disk(run, write):
    recipe = write("  thin = prune.chanels(keep: 75% of channels)")
    with open("/dev/full", "w") as full:
        assert run("check", recipe, stderr=full, stdout=full).returncode == 3
        assert run("check", recipe, "--format", "json", stdout=full, stderr=full).returncode == 3


@pytest.mark.slow
def test_streams_that_were_closed_at_the_start_are_not_taken_for_others(run, write, tmp_path):
    recipe = write("  thin = prune.chanels(keep: 75% of channels)")
    command = f"{sys.executable} -c '{SCRIPT}' check {recipe} 2>&-; echo $?; {sys.executable} -c '{SCRIPT}' passes >&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@pytest.mark.slow
def test_a_model_that_nobody_listens_to_stops_quietly(run, unread):
    words = ("run", "zoo:tiny-llama", "--prompt", "a", "-n", "200", "-v")
    heard, unheard = run(*words, capture_output=True), run(*words, stdout=unread, stderr=subprocess.PIPE)
    assert heard.returncode == unheard.returncode == 0
    assert "tokens in" in heard.stderr and unheard.stderr == ""


@pytest.mark.slow
def test_events_that_nobody_reads_end_no_compile(run, write, tmp_path):
    os.mkfifo(tmp_path / "events")
    reader = subprocess.Popen(["head", "-n", "1", tmp_path / "events"], stdout=subprocess.PIPE)
    done = run("compile", write(), "-o", "o", "--events", "events", capture_output=True)
    assert reader.communicate(timeout=10)[0].startswith(b'{"event"')
    assert done.returncode == 0 and (tmp_path / "o/small/manifest.json").is_file()


@pytest.mark.slow
def test_a_signal_ends_a_command_whose_words_nobody_reads(unread, tmp_path):
    code = f"""
from pathlib import Path
from effc.compiler.cli.verbs.interrupt import raise_or_exit_on_signal
import time
with raise_or_exit_on_signal():
    Path({str(tmp_path / "began")!r}).touch()
    while True:  # as a long call into torch, which hears nothing
        try:
            time.sleep(100)
        except KeyboardInterrupt:
            pass
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=unread, stderr=unread)
    while not (tmp_path / "began").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    try:
        assert child.wait(20) == 130
    finally:
        child.kill()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_for_a_person_is_written_at_once(tmp_path, unbuffered):
    """However Python was told to hold words back."""
    script = (
        "import sys; from effc.compiler.cli.verbs.pipe_streams import make_streams_pipe_safe; make_streams_pipe_safe();"
        "print('hear', file=sys.stderr); print(open('said').read())"
    )
    with open(tmp_path / "said", "w") as said:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.stdout.strip() == "hear"
