"""Two compiles into one place: the second is refused before it computes, and a killed one holds nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from effc.compiler.artifacts.output_lock import OutputPath, outputs_locked_until_finished
from effc.dsl.checker.recipe import Invocation
from effc.dsl.syntax.diagnostics import Reject

from tests.worlds import refused

HOLD = """
import sys, time
from pathlib import Path
from effc.compiler.artifacts.output_lock import OutputPath, outputs_locked_until_finished
from effc.dsl.checker.recipe import Invocation
with outputs_locked_until_finished([OutputPath(Path(sys.argv[1]), Invocation("hf", {"path": "a"}))], False):
    print("held", flush=True)
    time.sleep(600)
"""


def place(folder: Path, name: str = "a") -> OutputPath:
    return OutputPath(folder, Invocation("hf", {"path": name}))


def refusal(folder: Path, force: bool = False):
    def take():
        with outputs_locked_until_finished([place(folder)], force):
            pass

    return refused(take).diagnostics[0]


@pytest.fixture
def other(tmp_path):
    """Another process that holds `out/a`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_place_that_another_process_holds_is_refused_with_its_number(tmp_path, other):
    for force in (False, True):
        found = refusal(tmp_path / "out", force)
        assert (found.slug, found.exit) == ("output-busy", 2) and f"process {other.pid}" in found.message
    with outputs_locked_until_finished([place(tmp_path / "out", "b")], False):  # beside it there is room
        assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [".a.effc-lock", ".b.effc-lock"]


def test_a_process_that_was_killed_holds_nothing(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with outputs_locked_until_finished([place(tmp_path / "out")], False):
        assert refusal(tmp_path / "out").slug == "output-busy"  # of this process, too
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_left_of_a_place_that_was_given_back(tmp_path):
    with outputs_locked_until_finished([place(tmp_path / "out" / "deep", "a/b")], False):
        assert (tmp_path / "out" / "deep" / "a").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_what_came_to_be_while_one_waited_is_not_computed_again(tmp_path):
    (tmp_path / "a").mkdir()
    assert refusal(tmp_path).slug == "output-exists"


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".a.effc-lock").symlink_to(tmp_path / "precious")
    assert refusal(tmp_path).slug == "output-unwritable"
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_second_name_of_another_file_is_not_written(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".a.effc-lock").hardlink_to(tmp_path / "precious")
    assert refusal(tmp_path).slug == "output-unwritable"
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_pipe_in_place_of_the_lock_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / ".a.effc-lock")
    assert refusal(tmp_path).slug == "output-unwritable"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_a_folder_that_takes_nothing_whatever_its_rights_say_is_refused_before_any_work():
    from effc.compiler.artifacts.artifact import refuse_output_path

    with pytest.raises(Reject) as rejection:
        refuse_output_path(Path("/proc/out"), overwrite=False)
    assert rejection.value.diagnostics[0].slug == "output-unwritable"
