"""A process that reads a mapped file which somebody makes shorter ends with a sentence."""

import signal
import subprocess
import sys

import pytest
from effc.compiler.cli.verbs.exit_codes import file_cut
from effc.dsl.syntax.diagnostics import EXITS
from effc.kernels import levels

pytestmark = pytest.mark.skipif(levels.load_library() is None, reason="the kernels are not compiled")

READ = """
import mmap, os, sys
from effc.kernels.native import report_truncated_mapped_files
report_truncated_mapped_files()
with open(sys.argv[1], "r+b") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(sys.argv[1], 100)
print(data[1 << 20])
"""


def run(code, *arguments, flags=()):
    return subprocess.run([sys.executable, *flags, "-c", code, *arguments], capture_output=True, text=True)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(2 << 20))
    return str(path)


def test_a_file_that_is_cut_while_it_is_mapped_is_told_of_with_the_exit_code_of_its_fault(file):
    ended = run(READ, file)
    assert ended.returncode == EXITS[file_cut.exit] == 5
    first, help, *rest = ended.stderr.splitlines()
    assert first.startswith(f"error[{file_cut.slug}]: a file that was mapped became shorter") and not rest
    assert help.startswith("help: ")


def test_a_signal_that_somebody_sends_ends_the_process_as_ever():
    code = "import signal; from effc.kernels.native import report_truncated_mapped_files as w; w(); signal.raise_signal(signal.SIGBUS)"
    ended = run(code)
    assert ended.returncode == -signal.SIGBUS and not ended.stderr


def test_who_listens_already_is_left_alone(file):
    ended = run(READ, file, flags=("-X", "faulthandler"))
    assert ended.returncode == -signal.SIGBUS and "Fatal Python error: Bus error" in ended.stderr


def test_importing_effc_listens_to_nothing(file):
    ended = run(READ.replace("report_truncated_mapped_files()\nwith", "import effc\nwith"), file)
    assert ended.returncode == -signal.SIGBUS
