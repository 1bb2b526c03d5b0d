"""Jobs in forks of one process: each is as fresh as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from effc.compiler.artifacts.fork_server import ForkServer, run_verify_child
from effc.compiler.artifacts.verify import make_probe_inputs, opener_script_path, probe_stage_and_progress
from effc.compiler.plugin.target import Form
from safetensors.torch import save_file

from tests.compiler.artifacts.test_hf_target import changed, emit

pytestmark = pytest.mark.slow

PLAIN = str(opener_script_path(Form("model", "plain")))
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def mine():
    made = ForkServer(ENV)
    yield made
    made.end()
    assert made.process.poll() is not None


def job(folder: Path) -> list[str]:
    return [PLAIN, str(folder), str(folder / "inputs"), str(folder / "outputs"), "", "1"]


def test_a_job_that_ends_badly_says_why_and_the_next_is_not_touched_by_it(mine, tmp_path):
    for _ in range(2):
        done = mine.run_job(job(tmp_path), ENV, 120)
        assert done.returncode == 1 and "FileNotFoundError" in done.stderr.splitlines()[-1]
    assert mine.serves(ENV)


def test_another_environment_of_imports_is_another_nursery(mine):
    assert mine.serves({**ENV, "COLUMNS": "80"}) and not mine.serves({**ENV, "HF_HUB_OFFLINE": "0"})


def test_a_fork_of_its_owner_has_none(mine):
    child = os.fork()
    if not child:
        os._exit(int(mine.serves(ENV)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_job_that_takes_too_long_ends_with_its_nursery(mine, tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        mine.run_job(job(tmp_path), ENV, 0.0)
    assert not mine.serves(ENV)


def test_a_job_that_takes_seconds_is_looked_at_while_it_runs(tmp_path):
    fork_server, seen = ForkServer(ENV), []
    fork_server.end()
    slow = [sys.executable, "-c", "import time; input(); time.sleep(2.5); print(0)"]
    fork_server.process = subprocess.Popen(slow, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert fork_server.run_job([], ENV, 60, seen.append).returncode == 0 and len(seen) >= 2


def test_what_a_fresh_process_does_is_told_in_parts(tmp_path):
    program = changed("llama", "nothing")
    folder = emit(program, tmp_path / "a") / "model"
    outputs = tmp_path / "outputs"
    assert probe_stage_and_progress(False, outputs) == ("starting", "part 1 of 3")
    assert probe_stage_and_progress(True, outputs) == ("opening the folder", "part 2 of 3")
    save_file(make_probe_inputs(program.model), tmp_path / "inputs")
    done = run_verify_child([PLAIN, str(folder), str(tmp_path / "inputs"), str(outputs), "", "1"], ENV, 290)
    assert (done.returncode, outputs.is_file()) == (0, True), done.stderr
    assert probe_stage_and_progress(True, outputs) == ("computing logits and tokens", "part 3 of 3")


def test_a_nursery_that_idled_out_with_a_job_unread_has_not_done_it():
    """It ends with 0, as if the job had gone well; whoever asked asks another one."""
    fork_server = ForkServer(ENV)
    fork_server.end()
    ends = [sys.executable, "-c", "input()"]
    fork_server.process = subprocess.Popen(ends, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    with pytest.raises(BrokenPipeError):
        fork_server.run_job([], ENV, 60)
