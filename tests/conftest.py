"""`pytest --update` rewrites what goldens hold: files of `golden`, output blocks of suites and docstrings.

Properties draw the same examples in every run, so that a red run is about the change at hand; `make explore` draws
new ones (what it finds is written into the test as an `@example`).

Every test runs with one thread of torch, in this process and in those that it starts: how many threads add up is part
of every key, so a test that plans here what a process compiled there must find the number that was used there.
"""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, which reads it then

# No deadline: on a machine that others share, time is no property of the code.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("exploring", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--update", action="store_true", help="rewrite goldens with what the code says now")


@pytest.fixture(autouse=True)
def one_thread():
    """What a test asked of torch ends with it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_nursery():
    """Files that emit nothing may lie between two that do: what a nursery imports takes seconds each time."""
    from effc.compiler.artifacts import nursery

    nursery.IDLE = 3600.0


@pytest.fixture
def update(request) -> bool:
    return request.config.getoption("--update")


@pytest.fixture
def golden(request, update):
    """`golden(text, "plan.txt")`: equal to the file `goldens/plan.txt` beside the test, or written there."""
    folder = Path(request.path).parent / "goldens"

    def compare(text: str, name: str) -> None:
        path = folder / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is not written yet: run pytest --update"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs: run pytest --update and read the diff"

    return compare
