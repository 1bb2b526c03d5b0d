"""Records that projects, packages, knowledge bases and caches keep, as targets: JSON, TOML and YAML by anybody."""

import json
import tarfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from effc.compiler.apps.federation.declaration import read_declaration
from effc.compiler.apps.rttc.app import read_app
from effc.compiler.apps.rttc.engines.index import Unreachable
from effc.compiler.apps.rttc.knowledge import open_knowledge_base
from effc.compiler.apps.rttc.retrieval import RemoteRetriever
from effc.compiler.cli.main import main
from effc.compiler.core.cache import Cache
from effc.compiler.core.sealed_json import SEAL, sealed_json_bytes
from effc.compiler.driver.judging import baseline
from effc.compiler.ir.outcome import Front, Model, Outcome
from effc.compiler.ir.step_results import StepResults
from effc.compiler.models.checkpoints.model_folder import origin_of_folder
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.plugin import lockfile, recipe_packages
from effc.compiler.transforms.supernet.family import Family
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source

from tests.hostile.kinds import STORED
from tests.hostile.test_caches import unpacked
from tests.stored.test_stored import origin_in
from tests.worlds import context

YAML = b"""stage:
  group:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*mlp.*"], ignore: [lm_head]}
    GPTQModifier:
      targets: Linear
      config_groups: {one: {weights: {num_bits: 4, group_size: 64}, input_activations: {num_bits: 8}}}
      dampening_frac: 0.01
"""
OLIVE = {
    "input_model": {"type": "HfModel", "model_path": "org/name"},
    "passes": {
        "s": {"type": "SparseGPT", "sparsity": [2, 4]},
        "q": {"type": "Gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
        "l": {"type": "LoRA", "r": 16, "alpha": 32, "training_args": {"max_steps": 100, "learning_rate": 1e-4}},
        "e": {"type": "OnnxConversion"},
    },
}
LOCK = f"""format = 1
[recipes."slim.effspec"]
"model base" = "zoo tiny-llama"
[packages."edge"]
"source" = "../edge"
"version" = "1.0"
"tree" = "{"0" * 64}"
""".encode()
PACKAGE_FILE = b'name = "edge"\nversion = "1.0"\nsentence = "For small machines."\n'
MEASURE = {"metric": "params", "unit": "", "value": 3.0, "better": "lower", "clocked": False}
BASELINE = {
    "format": 1,
    "recipe": "r.effspec",
    "machine": {"cpu": "x"},
    "tolerance": {"quality": 0.01, "time": 0.1},
    "artifacts": [{"pipeline": "p", "variant": "", "artifact": "a", "inputs": {"model": "m"}, "measures": [MEASURE]}],
}
ANSWERS = (
    ("_facts", {"version": "1", "embedder": "e", "centre": [0.5, 0.25], "samples": 2}),
    ("retrieve", {"version": "1", "matches": [{"sample": {"question": "q", "answer": "a"}, "score": 0.5}]}),
)


def imports(honest: Path) -> list[bytes]:
    return [YAML, json.dumps(OLIVE).encode()]


def read_import(data: bytes, folder: Path) -> None:
    """A foreign recipe, by the command line; what comes of it is text of the language."""
    for name in ("r.yaml", "r.json"):
        (folder / name).write_bytes(data)
        with redirect_stdout(StringIO()) as written, redirect_stderr(StringIO()) as said:
            code = main(["import", str(folder / name)])
        assert code != 1, said.getvalue()[-300:]
        if code == 0:
            parse(Source("r.effspec", written.getvalue()))


def locks(honest: Path) -> list[bytes]:
    return [LOCK]


def read_lock(data: bytes, folder: Path) -> None:
    (folder / lockfile.NAME).write_bytes(data)
    found = lockfile.read_package_lock(folder)
    lockfile.write_package_lock(folder, found)
    assert lockfile.read_package_lock(folder) == found, "a lock that was written is read as it was"
    for name, facts in found["packages"].items():
        with suppress(Reject):  # what it pins is not here
            recipe_packages.verified_package_folder(name, facts, folder, folder / "cache")


def abouts(honest: Path) -> list[bytes]:
    return [PACKAGE_FILE]


def read_about(data: bytes, folder: Path) -> None:
    (folder / recipe_packages.PACKAGE_FILE).write_bytes(data)
    recipe_packages.read_recipe_package(folder)


def baselines(honest: Path) -> list[bytes]:
    return [json.dumps(BASELINE).encode()]


def read_baseline(data: bytes, folder: Path) -> None:
    baseline.baseline_path(folder / "r.effspec").write_bytes(data)
    baseline.read_baseline(folder / "r.effspec")


def declarations(honest: Path) -> list[bytes]:
    return [(honest / "flower" / "fedapp" / "federation.json").read_bytes()]


def read_federation(data: bytes, folder: Path) -> None:
    (folder / "federation.json").write_bytes(data)
    read_declaration(folder / "federation.json").to_json()


def apps(honest: Path) -> list[bytes]:
    return [(honest / "rttc" / "app.json").read_bytes()]


def read_the_app(data: bytes, folder: Path) -> None:
    (folder / "app.json").write_bytes(data)
    read_app(folder)


def bases(honest: Path) -> list[bytes]:
    _knowledge.append(honest / "rttc" / "knowledge")
    return [(honest / "rttc" / "knowledge" / "kb.json").read_bytes()]


_knowledge: list[Path] = []


def read_base(data: bytes, folder: Path) -> None:
    for file in _knowledge[0].iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "kb.json").write_bytes(data)
    base = open_knowledge_base(folder)
    base.search(torch.nn.functional.normalize(torch.ones(base.centre.numel()), dim=-1), 3)


def answers(honest: Path) -> list[bytes]:
    return [json.dumps(body).encode() for _, body in ANSWERS]


class _Answering(RemoteRetriever):
    """A server whose every answer is this one."""

    data = b""

    def _request_bytes(self, path: str, sent: bytes | None) -> bytes:
        return self.data


def read_answer(data: bytes, folder: Path) -> None:
    server = _Answering("http://server")
    object.__setattr__(server, "data", data)
    for ask in (server.facts, lambda: server.retrieve(torch.ones(2), 4)):
        try:
            ask()
        except Unreachable:
            continue


def steps(honest: Path) -> list[bytes]:
    """The steps of a cache, as `8d012cb` wrote them, and those of a front, of adapters and of families."""
    _worlds[:] = [unpacked(honest.parent / "cached")]
    with tarfile.open(STORED / "outcomes.tar.xz") as archive:
        archive.extractall(honest.parent, filter="data")
    _worlds.append(honest.parent / "outcomes")
    found = [[file.read_bytes() for file in sorted((world / "cache" / "steps").iterdir())] for world in _worlds]
    return found[0] + [data for data in found[1] if _is_of_several(json.loads(data))]


def _is_of_several(body: Any) -> bool:
    """Whether a step's result is no program."""
    return isinstance(body, dict) and not {"points", "adapters", "family"}.isdisjoint(body)


_worlds: list[Path] = []  # of programs, and of all that is none


def _origin(world: Path) -> Origin:
    ctx = context(world)
    return origin_in(world) if world is _worlds[0] else origin_of_folder(world / "m", "m", "auto", ctx.settings)


def read_step(data: bytes, folder: Path) -> None:
    """A step that somebody edited and sealed again, under the name that it gives itself."""
    body = None
    try:
        body = json.loads(data)
        record = sealed_json_bytes({k: v for k, v in body.items() if k != SEAL})
        key = body["key"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        record, key = data, "0" * 64
    if not (isinstance(key, str) and len(key) == 64 and key.isalnum()):
        key = "0" * 64
    world = _worlds[_is_of_several(body)]
    cache = Cache(world / "cache")
    file = cache.folder / "steps" / f"{key}.json"
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(record)
    try:
        list(cache.finished_steps())
        if cache.read_complete_step(key) is not None:
            _use(StepResults(cache, _origin(world)).load_outcome(key))
    finally:
        file.write_bytes(before) if before is not None else file.unlink()


def _use(outcome: Outcome) -> None:
    """What the step after it does with a result."""
    assert isinstance(outcome.summary, str)
    if isinstance(outcome, Family):
        outcome.cut_program_to_choice(outcome.space.choice("smallest"))
    elif not isinstance(outcome, (Model, Front)):
        list(outcome.members())
