"""The level of instruction sets: found, forced, refused; threads and processes around the kernels."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from effc.kernels import levels
from effc.kernels.levels import NoSuchLevel, load_library
from effc.kernels.ops import KERNELS

from tests.kernels.layers import run, weight

PROGRAM = """
import torch
from effc.kernels import levels
from effc.kernels.ops import KERNELS
w = torch.ones(32, 64)
y = torch.ops.effc.sparse_linear(torch.ones(1, 64), KERNELS["sparse_linear"].pack(w), None, 32)
print(levels.active_level(), int(y[0, 0]))
"""


def python(program: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_the_highest_level_runs_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("EFFC_ISA", raising=False)
    assert levels.active_level() == levels.available_levels()[-1] == levels.resolve_level("native")
    assert levels.available_levels()[0] == "portable"


def test_the_model_of_amx_runs_wherever_it_was_built():
    built = bool(load_library().effc_built(levels.CODES[levels.MODEL]))
    assert levels.level_unavailability_reason(levels.MODEL) == ("" if built else "this build has no model of AMX")


def test_a_processor_runs_the_lower_levels_of_its_own_family_alone():
    for family in levels.FAMILIES.values():
        for i, name in enumerate(family):
            assert [other for other in levels.NAMES if levels.runs_kernels_of_level(name, other)] == list(
                family[: i + 1]
            )
    assert len({*levels.FAMILIES["ARM"]} & {*levels.FAMILIES["x86-64"]}) == 1


def test_a_level_is_forced_by_the_environment(monkeypatch):
    for name in levels.available_levels():
        monkeypatch.setenv("EFFC_ISA", name)
        assert levels.active_level() == name and "as EFFC_ISA says" in levels.active_level_and_reason()


def test_an_unknown_or_missing_level_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setenv("EFFC_ISA", "avx1024")
    with pytest.raises(NoSuchLevel, match="EFFC_ISA is avx1024, and the levels are portable, avx2"):
        levels.active_level()
    missing = [name for name in levels.NAMES if levels.level_unavailability_reason(name)]
    for name in missing:
        monkeypatch.setenv("EFFC_ISA", name)
        with pytest.raises(NoSuchLevel, match=f"EFFC_ISA is {name}: this machine lacks"):
            levels.active_level()


@pytest.mark.slow
def test_a_process_runs_at_the_level_that_it_is_told():
    done = python(PROGRAM, EFFC_ISA="portable")
    assert done.stdout.split() == ["portable", "64"], done.stderr


@pytest.mark.slow
def test_a_forked_child_computes_after_its_parent_did():
    # Without care it would wait for threads that only its parent has.
    program = (
        PROGRAM
        + """
import os, sys
torch.set_num_threads(2)
w = torch.randn(2048, 512)
own, x = KERNELS["dense_linear"].pack(w), torch.ones(1, 512)
before = torch.ops.effc.dense_linear(x, own, None, 2048)
sys.stdout.flush()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(torch.ops.effc.dense_linear(x, own, None, 2048), before) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    done = python(program)
    assert done.stdout.split()[-1] == "0", done.stdout + done.stderr


def test_many_python_threads_compute_at_once():
    own, x = KERNELS["sparse_linear"].pack(weight(300, 600, 0.5)), torch.randn(20, 600)
    wanted, wrong = run("sparse_linear", x, own, None, 300), []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(run("sparse_linear", x, own, None, 300), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_more_threads_than_cores_and_a_single_allowed_core_give_the_same():
    program = (
        PROGRAM
        + """
import os
w = torch.randn(2048, 512)
own, x = KERNELS["dense_linear"].pack(w), torch.randn(1, 512)
torch.set_num_threads(1)
wanted = torch.ops.effc.dense_linear(x, own, None, 2048)
torch.set_num_threads(33)
many = torch.ops.effc.dense_linear(x, own, None, 2048)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(torch.equal(many, wanted), torch.equal(torch.ops.effc.dense_linear(x, own, None, 2048), wanted))
"""
    )
    done = python(program)
    assert done.stdout.split()[-2:] == ["True", "True"], done.stdout + done.stderr


def test_a_library_of_an_older_effc_is_left_alone():
    program = "from effc.kernels import levels\nprint(levels.load_library(), levels.active_level())"
    done = python(program, EFFC_KERNELS="libm.so.6")
    assert done.stdout.split() == ["None", "portable"], done.stderr


def test_without_torch_the_library_loads_and_names_its_level():
    program = "from effc.kernels import levels\nimport sys\nprint(levels.active_level(), 'torch' in sys.modules)"
    assert python(program).stdout.split() == [levels.active_level(), "False"]
