"""`effc serve --reload`: SIGHUP opens the models again, and no request notices."""

import asyncio
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from effc.compiler.apps.serving.access_log import AccessLog
from effc.compiler.apps.serving.daemon_thread import run_in_daemon_thread
from effc.compiler.apps.serving.reload import Reloader
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import load_file, save_file

from tests.compiler.apps.serving.conftest import serving, write_native_artifact

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def other(chatty, tmp_path_factory) -> Path:
    """An artifact of the same form whose model says something else."""
    work = tmp_path_factory.mktemp("reload")
    shutil.copytree(chatty, work / "model")
    weights = load_file(work / "model/model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
    weights[name] = -4 * weights[name]
    save_file(weights, work / "model/model.safetensors", {"format": "pt"})
    write_native_artifact(work / "served", work / "model", work)
    return work / "served"


@pytest.fixture
def models(artifact, tmp_path) -> Path:
    """A folder that has models alone."""
    shutil.copytree(artifact, tmp_path / "models/served")
    return tmp_path / "models"


def exchange(models: Path, other: Path) -> None:
    """Put another artifact into the place of the one that is served, by two renames, as `effc compile` does."""
    shutil.copytree(other, models / "new")
    (models / "served").rename(models / "old")
    (models / "new").rename(models / "served")


def reload(server, outcome: str) -> None:
    """Send SIGHUP, and wait until a reload has ended so."""
    before = server.metric("effc_model_reloads_total", outcome=outcome)
    server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 60
    while server.metric("effc_model_reloads_total", outcome=outcome) == before:
        assert time.monotonic() < deadline, server.said()
        time.sleep(0.05)


def streamed(server, **more) -> str:
    chunks = list(server.complete(stream=True, **more))
    assert chunks[-1].choices[0].finish_reason == "length"
    return "".join(chunk.choices[0].text for chunk in chunks)


def test_streams_across_a_reload_are_whole_and_of_one_model_each(models, other):
    with serving(other) as alone:
        after = streamed(alone, max_tokens=40)
    with serving(models / "served", "--reload") as server:
        before, ended = streamed(server, max_tokens=40), threading.Event()
        assert before != after

        def ask_until_the_end(_) -> list[str]:
            texts = []
            while not ended.is_set():
                texts.append(streamed(server, max_tokens=40))
            return [*texts, streamed(server, max_tokens=40)]

        with ThreadPoolExecutor(4) as pool:
            streams = pool.map(ask_until_the_end, range(4))
            time.sleep(0.5)
            exchange(models, other)
            reload(server, "loaded")
            time.sleep(0.5)
            ended.set()
            texts = list(streams)
        for each in texts:
            n_before = each.index(after)
            assert n_before > 0 and set(each[:n_before]) == {before} and set(each[n_before:]) == {after}
        assert server.metric("effc_requests_total", outcome="length") == 1 + sum(map(len, texts))
        (line,) = [line for line in server.lines() if line.get("event") == "reload"]
        assert (line["model"], line["outcome"]) == ("served", "loaded")


def test_a_stream_that_runs_ends_on_the_model_that_it_began_on(models, other):
    with serving(models / "served", "--reload") as server:
        expected = streamed(server, max_tokens=400)
        stream = server.complete(stream=True, max_tokens=400)
        first = next(iter(stream)).choices[0].text
        exchange(models, other)
        reload(server, "loaded")
        assert first + "".join(chunk.choices[0].text for chunk in stream) == expected
        assert streamed(server, max_tokens=400) != expected


def test_a_folder_that_does_not_verify_leaves_the_model_that_answers(models, other):
    with serving(models / "served", "--reload") as server:
        before = streamed(server)
        exchange(models, other)
        config = models / "served/native/plan.json"
        text = config.read_text()
        config.write_text(text + " ")
        reload(server, "refused")
        assert streamed(server) == before
        (line,) = [line for line in server.lines() if line.get("event") == "reload"]
        assert line["outcome"] == "refused" and "plan.json" in line["reason"]
        config.write_text(text)
        reload(server, "loaded")
        assert streamed(server) != before
        shutil.rmtree(models / "served")
        reload(server, "refused")
        assert streamed(server) and "there is no" in server.said()


@pytest.fixture
def default_hangup():
    """What SIGHUP does to a new process, also where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("default_hangup")
def test_without_the_option_a_hangup_ends_the_server(models):
    with serving(models / "served") as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(20) != 0


def test_a_model_beside_personal_files_is_not_served_so(models, monkeypatch):
    from effc.compiler.cli.verbs.model_sources import parse_model_arguments, refuse_reload_beside_personal_files

    sources = parse_model_arguments([str(models / "served")])
    refuse_reload_beside_personal_files(sources)
    for home in (models, models / "somebody"):
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(Reject, match="lies beside personal files"):
            refuse_reload_beside_personal_files(sources)


def test_an_adapter_beside_personal_files_is_not_served_so(models, tmp_path, monkeypatch):
    from effc.compiler.cli.verbs.model_sources import parse_model_arguments, refuse_reload_beside_personal_files

    (tmp_path / "home/law").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sources = parse_model_arguments([str(models / "served")], adapters=[f"law={tmp_path}/home/law"])
    with pytest.raises(Reject, match="home/law lies beside personal files"):
        refuse_reload_beside_personal_files(sources)


def test_a_loop_that_ends_waits_neither_for_a_model_that_opens_nor_for_one_that_is_drained():
    released = threading.Event()

    async def reload_and_leave() -> None:
        for _ in range(50):  # more than the loop's pool has workers
            task = asyncio.create_task(run_in_daemon_thread(released.wait, 60))
            tasks.append(task)
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "a request"), 5) == "a request"

    tasks: list[asyncio.Task] = []
    start = time.monotonic()
    asyncio.run(reload_and_leave())
    assert time.monotonic() - start < 10 and all(task.cancelled() for task in tasks)
    released.set()


def test_a_thread_gives_its_result_or_raises_what_it_raised():
    assert asyncio.run(run_in_daemon_thread(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_in_daemon_thread(divmod, 7, 0))


def test_a_signal_during_a_reload_ends_the_server_at_once():
    """The reloader's task is cancelled with the loop, while the model is still opened."""
    began, released = threading.Event(), threading.Event()
    served = SimpleNamespace(model_names=["m"])

    def open_service(name: str):
        began.set()
        released.wait(60)

    async def reload_and_leave() -> None:
        Reloader(served, open_service, AccessLog(None)).request()
        while not began.is_set():
            await asyncio.sleep(0.01)

    start = time.monotonic()
    asyncio.run(reload_and_leave())
    assert time.monotonic() - start < 10
    released.set()
