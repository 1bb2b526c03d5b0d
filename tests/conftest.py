"""`pytest --update` rewrites what goldens hold: files of `golden`, output blocks of suites and docstrings.

Properties draw the same examples in every run, so that a red run is about the change at hand; `make explore` draws
new ones (what it finds is written into the test as an `@example`).

Every test runs with one thread of torch, in this process and in those that it starts: how many threads add up is part
of every key, so a test that plans here what a process compiled there must find the number that was used there.
"""

import gc
import os
import random
import sys
import time
from collections import Counter
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
    parser.addoption("--lot", metavar="SEED", help="run files in an order drawn with this seed")
    parser.addoption("--minutes", type=float, help="skip tests that may not end within so many minutes")


LEFT_OUT = pytest.StashKey[Counter]()  # (marker, file) -> how many tests of it did not run
SAID_BY = {"heavy": "make test-heavy", "slow": "make test-slow"}


ORDINARY = 120  # seconds that a test may well take whose timeout is not above the default
START = pytest.StashKey[float]()  # seconds of the monotonic clock at which the first test begins


def pytest_configure(config):
    config.stash[LEFT_OUT] = Counter()


def pytest_collection_modifyitems(config, items):
    """Files in an order drawn by lot; each worker draws the same one, and the tests of a file stay together."""
    seed = config.getoption("--lot")
    if seed is not None:
        files = sorted({item.nodeid.partition("::")[0] for item in items})
        random.Random(seed).shuffle(files)
        rank = {file: index for index, file in enumerate(files)}
        items.sort(key=lambda item: rank[item.nodeid.partition("::")[0]])


def pytest_collection_finish(session):
    """What was collected and imported stays until the end: no collection of garbage goes through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # graphs and their nodes are made by the ten thousand; most are no garbage
    session.config.stash[START] = time.monotonic()


def pytest_runtest_setup(item):
    minutes, mark = item.config.getoption("--minutes"), item.get_closest_marker("timeout")
    if minutes is None:
        return
    left = item.config.stash[START] + 60 * minutes - time.monotonic()
    timeout = mark.args[0] if mark is not None else 0
    if left < (timeout if timeout > 300 else ORDINARY):
        pytest.skip(f"does not fit into the {minutes:g} minutes of this run")


def pytest_deselected(items):
    for item in items:
        mark = next((mark for mark in SAID_BY if item.get_closest_marker(mark) is not None), None)
        if mark is not None:
            item.config.stash[LEFT_OUT][mark, item.nodeid.partition("::")[0]] += 1


def pytest_sessionfinish(session):
    """Each of several processes has looked at all tests; what one of them says is enough."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = [[*key, count] for key, count in session.config.stash[LEFT_OUT].items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    left = {(mark, file): count for mark, file, count in getattr(node, "workeroutput", {}).get("left_out", ())}
    node.config.stash[LEFT_OUT] |= Counter(left)


def pytest_terminal_summary(terminalreporter, config):
    left = config.stash[LEFT_OUT]
    for mark, command in SAID_BY.items():
        files = {file.removeprefix("tests/"): count for (kind, file), count in sorted(left.items()) if kind == mark}
        if files:
            terminalreporter.section(f"{sum(files.values())} {mark} tests did not run: {command}")
            terminalreporter.write_line(", ".join(f"{file} ({count})" for file, count in files.items()))


@pytest.fixture(autouse=True)
def one_thread():
    """What a test asked of torch ends with it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory):
    """The cache of commands that name none: the user's may be large, and what it holds decides what plans say."""
    os.environ["EFFC_CACHE_DIR"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="session", autouse=True)
def one_nursery():
    """Files that emit nothing may lie between two that do: what a nursery imports takes seconds each time."""
    from effc.compiler.artifacts import fork_server

    fork_server.IDLE = 3600.0


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
