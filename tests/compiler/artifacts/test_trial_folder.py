"""The folder by which effc tries whether it can write somewhere."""

import subprocess
import sys

from effc.compiler.artifacts.artifact import recover_or_remove_stale_drafts_in, refuse_unwritable_folder

KILLED = """
import os, sys, pathlib
os.rmdir = lambda path: os.kill(os.getpid(), 9)
from effc.compiler.artifacts.artifact import refuse_unwritable_folder
refuse_unwritable_folder(pathlib.Path(sys.argv[1]))
"""


def test_a_trial_leaves_nothing(tmp_path):
    refuse_unwritable_folder(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_a_kill_leaves_of_a_trial_goes_with_the_next_draft(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False)
    assert run.returncode == -9 and len(list(tmp_path.iterdir())) == 1
    recover_or_remove_stale_drafts_in(tmp_path)
    assert not list(tmp_path.iterdir())
