"""The emitted app over Flower's own messages, where Flower is installed: the states of `effc run`, bit for bit."""

import importlib
import sys
from types import SimpleNamespace

import pytest
from effc.compiler.apps.federation.checkpoint import Checkpoint
from effc.compiler.apps.federation.results import MARK

pytest.importorskip("flwr")
pytest.importorskip("peft")

from tests.compiler.apps.federation.test_flower_target import compiled, declared, run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("flower"), "strategy: abm")


def serve(artifact, config):
    """Flower's Grid implemented in this process, with a context for every node."""
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # its launchers do this

    class InProcess(Grid):
        run = property(lambda self: SimpleNamespace(run_id=1))

        def __init__(self, client):
            self.client, self.replies = client, {}
            self.contexts = {
                100 - k: Context(
                    run_id=1, node_id=100 - k, node_config={"partition-id": k}, run_config=config, state=RecordDict()
                )
                for k in range(3)
            }

        def set_run(self, run): ...
        def create_message(self, *args, **kwargs): ...
        def send_and_receive(self, messages, *, timeout=None): ...

        def get_node_ids(self):
            return list(self.contexts)

        def push_messages(self, messages):
            for message in messages:
                message.metadata.__dict__["_message_id"] = name = str(len(self.replies) + 1)
                try:
                    self.replies[name] = self.client(message, self.contexts[message.metadata.dst_node_id])
                except Exception as error:
                    self.replies[name] = Message(Error(code=2, reason=repr(error)), reply_to=message)
                yield name

        def pull_messages(self, message_ids):
            return [self.replies[name] for name in message_ids]

    sys.path.insert(0, str(artifact))
    try:
        server, client = (importlib.import_module(f"fedapp.{name}").app for name in ("server_app", "client_app"))
        server(InProcess(client), Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    finally:
        sys.path.remove(str(artifact))
        for name in [n for n in sys.modules if n.partition(".")[0] == "fedapp"]:
            del sys.modules[name]


@pytest.mark.slow
def test_the_app_leaves_the_states_of_the_simulation_and_a_checkpoint(artifact, tmp_path, monkeypatch):
    from effc.compiler.apps.federation.results import write_results

    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    config = {
        "rounds": 2,
        "clients": 3,
        "deadline": 300.0,
        "model": str(artifact / "model"),
        "data": str(artifact.parents[1]),
        "work": str(tmp_path / "work"),
        "output": str(tmp_path / "result"),
    }
    serve(artifact, config)
    whole = run(artifact, tmp_path / "simulated")
    write_results(whole.strategy.results(), whole.course, declared(artifact), tmp_path / "wanted")
    assert (tmp_path / "result" / MARK).is_file()
    for client in range(3):
        one, two = (
            tmp_path / place / f"client-{client}" / "adapter_model.safetensors" for place in ("result", "wanted")
        )
        assert one.read_bytes() == two.read_bytes()
    said = declared(artifact)
    assert Checkpoint(tmp_path / "work" / said.identity, said.identity).read_last_round() is not None
