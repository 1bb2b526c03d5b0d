"""The files of a Flower App: declaration, two short Python files, pyproject.toml and a page that says how to run it."""

import json
from pathlib import Path

from .declaration import NAME, Declaration

PACKAGE = "fedapp"
FLWR = ">=1.42,<1.43"

_SERVER = '''"""The server of a federation: sends, waits, puts together, and keeps a checkpoint after every round.

What it does with the clients' states stands in federation.json (`strategy`); how, in effc.compiler.apps.federation.
"""

from pathlib import Path

from effc.compiler.apps.federation.flower import serve
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; an exception fails the run with its sentence."""
    serve(grid, context, Path(__file__).with_name("federation.json"))
'''

_CLIENT = '''"""A client of a federation: trains what it is sent on its own rows, which stay here."""

from pathlib import Path

from effc.compiler.apps.federation.flower import respond
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one message of the server."""
    return respond(message, context, Path(__file__).with_name("federation.json"))
'''

_PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{package}"
version = "0.1.0"
description = "{about}"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.42,<1.43", "effc[fed]"]

[tool.flwr.app]
publisher = "effc"
fab-format-version = 1
flwr-version-target = "1.42.0"
fab-include = ["{package}/*.py", "{package}/federation.json", {edits}"README.md", "LICENSE"]

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# Paths are of the machine that reads them; a node's own config wins: --node-config 'model="..." data="..."'.
[tool.flwr.app.config]
rounds = {rounds}
clients = {clients}
deadline = {deadline}
model = ""
data = ""
work = ""
output = ""
"""

_LICENSE = """This app was written by effc and is under the Apache License 2.0 (SPDX-License-Identifier: Apache-2.0),
https://www.apache.org/licenses/LICENSE-2.0. The model that it federates has a licence of its own.
"""


def write_flower_app(declaration: Declaration, federation_name: str, destination: Path) -> None:
    """The app of a federation, beside the model's folder in `destination`."""
    package = destination / PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text(f'"""The Flower App of the federation {federation_name}."""\n')
    (package / "server_app.py").write_text(_SERVER)
    (package / "client_app.py").write_text(_CLIENT)
    (package / NAME).write_text(json.dumps(declaration.to_json(), indent=1) + "\n")
    description = f"{training_sentence(declaration)}, compiled by effc"
    (destination / "pyproject.toml").write_text(
        _PROJECT.format(
            package=PACKAGE,
            about=description,
            rounds=declaration.rounds,
            clients=declaration.clients,
            deadline=float(declaration.deadline),
            edits='"edits/reft.json", ' if declaration.trains == "reft" else "",
        )
    )
    (destination / "LICENSE").write_text(_LICENSE)
    (destination / "README.md").write_text(make_readme(declaration, federation_name))


def training_sentence(declaration: Declaration) -> str:
    """Summary of the training in one line: `12 clients train LoRA adapters by fedavg`."""
    subject = {
        "lora": "LoRA adapters",
        "reft": "interventions",
        "prompt": "a soft prompt",
        "full": "sub-networks" if declaration.sizes else "all weights",
        "index": "",
    }[declaration.trains]
    if declaration.trains == "index":
        return (
            f"{declaration.clients} clients search what all of them have, the best {declaration.top} for each question"
        )
    return f"{declaration.clients} clients train {subject} by {declaration.strategy}"


def distribution_phrase(declaration: Declaration) -> str:
    """Phrase for the distribution of rows among clients, after `rows are`."""
    return {
        "even": "dealt out evenly",
        "blocks": "cut into blocks",
        "distinct": "one data set for each client",
        "dirichlet": f"drawn from a Dirichlet distribution with beta {declaration.beta:g}",
    }[declaration.split]


_PAGE = """# {name}

{sentence}, {rounds} rounds. `{package}/federation.json` says all of it; the model is `{folder}/`, sha256
`{base}`: a client with another one is left out.

A client sends {up} in a round. {rows}

## Run it here, in one process

    effc run .

The recipe and its data have to lie in a folder above this one, as they did when it was compiled. No Flower is needed.
Killed, it goes on where it was; the states are written to `../{name}-result`.

## Run it in Flower's simulation

    pip install "effc[fed]" "flwr[simulation]{flwr}"
    export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
    export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1       # or every run does `uv sync`, over the network
    export FLWR_HOME=$PWD/../{name}-flower FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=39191
    flwr run . --federation-config 'num-supernodes={clients} client-resources-num-cpus=1' \\
        --run-config "model='$PWD/{folder}' data='FOLDER' output='$PWD/../{name}-result'"

`FOLDER` is what the data's paths start from: the folder of the recipe. `flwr run` returns once the run is submitted,
and with `--stream` it exits 0 even if the run fails: ask `flwr list --run-id ID --format json` for
`finished:completed`; `flwr log ID --show` prints the table of rounds. It leaves a SuperLink running at that port, which
keeps the environment that it was born with and outlives the command: end it by its id, which
`ps -eo pid,args | grep 39191` shows.

## Deploy it

On one machine, all of what follows at once, with keys made for it; `--data` as often as there are clients:

    effc federate up . --data OWN-DATA-OF-CLIENT-0 ...
    effc federate status . --wait                               # exit code 1 where the run failed
    effc federate down .

By hand: one SuperLink, which must be reachable by nobody but nodes and you (its Control API lets whoever reaches it run
code on every node), TLS with your own CA, and a P-384 key in OpenSSH format for every node. For a SuperLink that is not
on this machine, `127.0.0.1` below is its address, in the certificate too:

    mkdir ../{name}-keys && cd ../{name}-keys                     # nothing of it belongs into the app
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes -days 30 -subj '/CN=federation CA' \\
        -keyout ca.key -out ca.crt
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes -subj '/CN=localhost' \\
        -keyout server.key -out server.csr
    echo 'subjectAltName=DNS:localhost,IP:127.0.0.1' > server.ext
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -days 30 -extfile server.ext -out server.crt
    ssh-keygen -q -t ecdsa -b 384 -N '' -f node0                # for every node, on its machine
    export FLWR_HOME=$PWD/flower; mkdir flower
    printf '[superlink.NAME]\\naddress = "127.0.0.1:9100"\\nroot-certificates = "%s"\\n' \\
        $PWD/ca.crt > flower/config.toml
    head -c 32 /dev/urandom > secret; chmod 600 secret
    flower-superlink --host 127.0.0.1 --port 9100 --database state.db --isolation process \\
        --superexec-auth-secret-file secret --enable-supernode-auth --ssl-ca-certfile ca.crt \\
        --ssl-certfile server.crt --ssl-keyfile server.key --disable-runtime-dependency-installation
    flower-superexec --runtime-api-address 127.0.0.1:9100 --root-certificates ca.crt \\
        --superexec-auth-secret-file secret
    flwr supernode register node0.pub NAME                      # once for every node
    flower-supernode --superlink 127.0.0.1:9100 --root-certificates ca.crt \\
        --auth-supernode-private-key node0 --host 127.0.0.1 --port 9200 --max-retries 5 \\
        --node-config 'partition-id=0 num-partitions={clients} model="/path/{folder}" data="/path/own-data"'
    flwr run ../{name} NAME --run-config "work='/path/checkpoints' output='/path/result'"

The SuperLink, the executor and each node run until they are ended: each in a terminal of its own. Every node has its
own `--port`. A node that names `data` learns from all rows that it finds there; one that does not gets its part of the
common data. A round takes five seconds at least, whatever is trained; a node that was killed can come back after a
minute. A client that hangs is stopped when its round is over, since it would block its node for all runs; one that
hangs inside of a library's call can't be: restart its node.
"""


def make_readme(declaration: Declaration, name: str) -> str:
    """The README of the app."""
    from ...core.quantity import size_text
    from .state import value_count

    sent = 4 * value_count(declaration.full) // (2 if declaration.strategy == "ffa" else 1)
    halves = " (adapters of the largest rank)" if declaration.ranks else ""
    names = ", ".join(f"`{d.name}`" for d in declaration.data)
    rows = (
        f"The rows of {names} are {distribution_phrase(declaration)}; "
        f"a client keeps {100 * declaration.hold:g}% of its rows "
        "back and judges itself by them."
    )
    return _PAGE.format(
        name=name,
        sentence=training_sentence(declaration),
        rounds=declaration.rounds,
        package=PACKAGE,
        folder=declaration.folder,
        base=declaration.base,
        up="vectors, scores and numbers, no text," if declaration.trains == "index" else f"{size_text(sent)}{halves}",
        rows=rows,
        flwr=FLWR,
        clients=declaration.clients,
    )
