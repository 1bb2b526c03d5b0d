"""Artifacts of every kind that somebody changed, hashes and all: opened by every verb, they do nothing but be refused.

Each lot runs in a process of its own whose file opens, imports and process starts are watched (`watched.py`).
"""

import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts.finite_weights import _is_finite_or_mask
from effc.compiler.artifacts.load import load, target_class
from effc.compiler.artifacts.manifest import read_manifest
from effc.compiler.artifacts.signature import sign_artifact
from effc.compiler.artifacts.signing_keys import write_key_pair
from effc.compiler.models.checkpoints.safetensors_header import read_safetensors_header
from effc.compiler.runtimes.gguf import reading as gguf
from effc.compiler.runtimes.native.plan_files import pieces
from effc.dsl.syntax.diagnostics import Reject

from tests.hostile import kinds
from tests.hostile.kinds import FRONTS, KINDS
from tests.hostile.mutations import consistent, mutate
from tests.hostile.watched import FAKE

torch.set_num_threads(1)
SECONDS, MEBIBYTES = 20, 600  # of one case by all verbs; a machine that others share is slow
MIN_SAMPLES = dict.fromkeys(KINDS, 50) | {"program": 12}  # in the default lot; torch takes a second to read a program
COUNT = int(os.environ.get("EFFC_HOSTILE", "1000"))  # of a kind, in the heavy lot


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return kinds.honest(tmp_path_factory.mktemp("honest"))


def opened(honest: Path, cases: dict[Path, str], tmp_path: Path) -> list[dict]:
    """What each case came to, in a process that reaches no network: opened by "all" verbs or by one in "turn"."""
    listed = tmp_path / "cases"
    listed.write_text("\n".join(f"{each} {case}" for case, each in cases.items()))
    environment = {
        **os.environ,
        "EFFC_CACHE_DIR": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (tmp_path / "found").open("w") as found:  # a line as soon as a case is done, for whoever waits
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("watched.py")), str(honest), str(listed)],
            env=environment,
            cwd=tmp_path,
            stdout=found,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, f"the process ended: {done.stderr[-3000:]}"
    return [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]


def harmless(found: dict) -> list[str]:
    """What a case did that it must not, in words."""
    wrong = [f"{effect}" for effect in found["effects"]]
    wrong += [f"{verb}: {outcome}" for verb, outcome in found["outcomes"].items() if "crash" in outcome]
    wrong += [f"took {found['seconds']} s"] if found["seconds"] > SECONDS else []
    wrong += [f"grew by {found['mebibytes']} MiB"] if found["mebibytes"] > MEBIBYTES else []
    return wrong


def changed(honest: Path, kind: str, count: int, seed: int, into: Path) -> list[Path]:
    """Copies of an artifact, each changed in another way."""
    cases = []
    for number in range(count):
        case = into / f"{kind}-{number}"
        shutil.copytree(honest / kind, case)
        mutate(case, random.Random(f"{kind} {seed} {number}"))
        cases.append(case)
    return cases


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_changed_artifacts_do_nothing_but_be_refused(honest, kind, tmp_path):
    found = opened(honest, dict.fromkeys(changed(honest, kind, COUNT, 1, tmp_path), "all"), tmp_path)
    wrong = {f["case"]: said for f in found if (said := harmless(f))}
    assert len(found) == COUNT and not wrong, json.dumps(wrong, indent=1)


def edited(kind, file, change):
    """A case that changes one file's JSON."""

    def make(case: Path):
        path = case / file
        body = json.loads(path.read_text())
        change(body)
        path.write_text(json.dumps(body))
        consistent(case)

    return kind, make


def replaced(kind, file, by):
    """A case whose file is something else: a link, a pipe."""

    def make(case: Path):
        (case / file).unlink()
        by(case / file)

    return kind, make


def calls(target):
    def change(body):
        graph = next(iter(body["effc"]["edits"]["graphs"].values()))["graph"]
        next(node for node in graph["nodes"] if node["op"] == "call_module")["target"] = target

    return change


CONFIG = "compact/config.json"
CRAFTED = {
    "a method that reads a file": edited("compact", CONFIG, calls("from_pretrained")),
    "a method that writes a file": edited("compact", CONFIG, calls("self_attn.config.to_json_file")),
    "a class that is imported": edited(
        "compact",
        CONFIG,
        lambda b: next(iter(b["effc"]["edits"]["swapped"].values())).update({"class": "passes.prune.blocks:Blocks"}),
    ),
    "a kernel of the hub": edited(
        "compact",
        CONFIG,
        lambda b: b["effc"]["edits"]["attributes"].update({"config._attn_implementation": "org/kernel"}),
    ),
    "code in the base config": edited(
        "compact",
        CONFIG,
        lambda b: b["effc"]["base"].update(
            {"auto_map": {"AutoConfig": "evil.E"}, "architectures": ["AutoModelForCausalLM"]}
        ),
    ),
    "ten million layers": edited("compact", CONFIG, lambda b: b["effc"]["base"].update(num_hidden_layers=10**7)),
    "a stock class that is none": edited(
        "stock",
        "model/config.json",
        lambda b: b.update(architectures=["pipeline"], auto_map={"AutoModelForCausalLM": "evil.E"}),
    ),
    "a stock kernel": edited("stock", "model/config.json", lambda b: b.update(_attn_implementation="org/kernel")),
    "a stock quantisation": edited(
        "stock", "model/config.json", lambda b: b.update(quantization_config={"quant_method": "bitsandbytes"})
    ),
    "a tokenizer that is none": edited(
        "stock",
        "model/tokenizer_config.json",
        lambda b: b.update(tokenizer_class="Trainer", auto_map={"AutoTokenizer": ["evil.E", None]}),
    ),
    "a profile of words": edited(
        "flower",
        "manifest.json",
        lambda b: b["profile"]["after"].update({path: {"mlp": {"channels": "x"}} for path in b["profile"]["after"]}),
    ),
    "a manifest without an end": replaced("stock", "manifest.json", lambda path: path.symlink_to("/dev/zero")),
    "a manifest that waits": replaced("compact", "manifest.json", os.mkfifo),
    "a config that waits": replaced("compact", CONFIG, os.mkfifo),
    "a plan that waits": replaced("native", "native/plan.json", os.mkfifo),
    "a step that passes for a line": edited(
        "native", "native/plan.json", lambda b: b["plan"]["steps"][-1].update(op=f"a\n{FAKE}")
    ),
    "weights without an end": replaced("native", "native/weights.bin", lambda path: path.symlink_to("/dev/zero")),
    "a program without an end": replaced("program", "program/model.pt2", lambda path: path.symlink_to("/dev/zero")),
}


@pytest.fixture(scope="module")
def lot(honest, tmp_path_factory):
    """What fifty changed artifacts of each kind and all crafted ones came to, by name: one process opens them all."""
    folder = tmp_path_factory.mktemp("lot")
    cases = {path: "turn" for kind in KINDS for path in changed(honest, kind, MIN_SAMPLES[kind], 0, folder)}
    names = {path: path.name for path in cases}
    for name, (kind, make) in CRAFTED.items():
        case = folder / name.replace(" ", "-")
        shutil.copytree(honest / kind, case)
        (case / "evil.py").write_text("raise SystemExit('ran')")
        make(case)
        cases[case], names[case] = "all", name
    return {names[Path(found["case"])]: found for found in opened(honest, cases, folder)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_changed_artifacts_do_nothing_but_be_refused(lot, kind):
    found = {name: lot[name] for name in lot if name.startswith(f"{kind}-")}
    wrong = {name: said for name, case in found.items() if (said := harmless(case))}
    assert len(found) == MIN_SAMPLES[kind] and not wrong, json.dumps(wrong, indent=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_artifacts_do_nothing_but_be_refused(lot, name):
    assert not harmless(lot[name])
    # A kernel, a quantisation and a tokenizer's class are left out, or asked for by other verbs than `load`.
    if not any(word in name for word in ("stock kernel", "quantisation", "tokenizer")):
        assert lot[name]["outcomes"]["load"] != "opened"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_verify_tells_a_sound_artifact_from_a_changed_one(honest, kind, tmp_path, capsys):
    from effc.compiler.cli.main import main

    assert main(["verify", str(honest / kind)]) == 0
    assert capsys.readouterr().out.startswith("ok: ")
    case = tmp_path / kind
    shutil.copytree(honest / kind, case)
    file = max((f for f in case.rglob("*") if f.is_file() and f.parent != case), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(case)]) == 5
    assert "has other content than when it was written" in capsys.readouterr().err


def files_of(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["peft", "reft"])
def test_adapters_are_not_put_onto_a_base_that_was_changed(honest, kind, tmp_path):
    for file in files_of(honest / kind / "base"):
        case = tmp_path / kind
        shutil.copytree(honest / kind, case)
        flip(case / file.relative_to(honest / kind))
        with pytest.raises(Reject, match="has other content than when it was written"):
            load(case)
        shutil.rmtree(case)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FRONTS])
def test_whatever_file_of_an_artifact_was_changed_its_signature_does_not_vouch_for_it(honest, kind, tmp_path):
    case = tmp_path / kind
    shutil.copytree(honest / kind, case)
    key = write_key_pair(tmp_path / "key")
    sign_artifact(case, tmp_path / "key")
    one_of_each = {file.relative_to(case).parts[0]: file for file in files_of(case)}
    for file in one_of_each.values():
        if file.name == "README.md":
            continue
        before = file.read_bytes()
        flip(file)
        with pytest.raises(Reject):
            load(case, signed_by=[key])
        file.write_bytes(before)
    (case / "extra.py").write_text("")
    with pytest.raises(Reject, match=r"extra\.py is not in the manifest"):
        load(case, signed_by=[key])


def test_verify_holds_native_weights_against_their_checksums_though_the_manifest_was_changed_along(
    honest, tmp_path, capsys
):
    from effc.compiler.cli.main import main

    case = tmp_path / "native"
    shutil.copytree(honest / "native", case)
    file, entries = case / "native/weights.bin", json.loads((case / "native/plan.json").read_text())["entries"]
    sound = file.read_bytes()
    for name in ("model.embed_tokens.rows", "model.layers.0.mlp.gate_proj.weight"):
        data = bytearray(sound)
        data[entries[name]["at"] + entries[name]["bytes"] - 3] ^= 1
        file.write_bytes(data)
        consistent(case)
        assert main(["verify", str(case)]) == 5
        assert f"`{name}`" in (said := capsys.readouterr().err) and "native-damaged" in said


def spoil_safetensors(file: Path, number: bytes) -> str:
    header = read_safetensors_header(file)
    name, slot = next((n, s) for n, s in header.slots.items() if s.dtype in ("F32", "BF16") and len(s.shape) == 2)
    start = file.stat().st_size - max(s.end for s in header.slots.values())
    put(file, start + slot.start, number, 4 if slot.dtype == "F32" else 2)
    return name


def spoil_native(file: Path, number: bytes) -> str:
    plan = json.loads((file.parent / "plan.json").read_text())
    name, entry = next((n, e) for n, e in plan["entries"].items() if e["kind"] != "packed")
    put(file, entry["at"], number, {"f32": 4, "bf16": 2}[entry["kind"]])
    data = memoryview(file.read_bytes())[entry["at"] : entry["at"] + entry["bytes"]]
    entry["sha256"] = [hashlib.sha256(piece).hexdigest() for piece in pieces(data)]
    (file.parent / "plan.json").write_text(json.dumps(plan))
    return name


def spoil_gguf(file: Path, number: bytes) -> str:
    name, entry = next((n, e) for n, e in gguf.read_gguf(file).entries.items() if e.kind == 0)  # F32
    put(file, entry.start, number, 4)
    return name


def put(file: Path, at: int, number: bytes, width: int) -> None:
    """Write the last bytes of a float32 that are as wide as the number that is there: those of bfloat16, too."""
    with open(file, "r+b") as stream:
        stream.seek(at)
        stream.write(number[-width:])


SPOILS = {".safetensors": spoil_safetensors, ".bin": spoil_native, ".gguf": spoil_gguf}
NUMBERS = {"nan": struct.pack("<f", math.nan), "infinite": struct.pack("<f", -math.inf)}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("program", "onnx", "rttc")])
def test_verify_names_weights_that_are_no_numbers_though_hashes_were_written_anew(
    honest, kind, number, tmp_path, capsys
):
    from effc.compiler.cli.main import main

    for place in files_of(honest / kind):
        if place.suffix not in SPOILS:
            continue
        case = tmp_path / kind
        shutil.copytree(honest / kind, case)
        file = case / place.relative_to(honest / kind)
        name = SPOILS[file.suffix](file, NUMBERS[number])
        consistent(case)
        assert main(["verify", str(case)]) == 5
        said = capsys.readouterr().err
        assert "error[weights-not-finite]" in said and f"`{name}` holds 1 value NaN or infinite" in said
        shutil.rmtree(case)


@pytest.mark.parametrize("kind", ["program", "onnx"])
def test_verify_names_weights_of_graphs_that_are_no_numbers(honest, kind, tmp_path, capsys):
    from effc.compiler.cli.main import main

    case = tmp_path / kind
    shutil.copytree(honest / kind, case)
    graph = next(f for f in files_of(case) if f.suffix in (".pt2", ".onnx"))
    tensors = target_class(read_manifest(case).kind).tensors(graph)
    name, weight = next((n, x) for n, x in tensors if x.dim() == 2 and x.is_floating_point())
    own = weight.detach().contiguous().numpy().tobytes()
    del weight  # which is mapped from the file
    file, at = next((f, at) for f in files_of(case) if (at := f.read_bytes().find(own)) >= 0)
    put(file, at, NUMBERS["nan"], 4)
    consistent(case)
    assert main(["verify", str(case)]) == 5
    assert f"`{name}` holds 1 value NaN or infinite" in capsys.readouterr().err


def test_a_mask_of_minus_infinity_is_no_fault():
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    assert (
        _is_finite_or_mask(mask) and _is_finite_or_mask(torch.tensor(torch.inf)) and _is_finite_or_mask(torch.arange(3))
    )
    assert not any(
        map(_is_finite_or_mask, (mask + 1, -mask, mask.where(mask == 0, torch.nan), torch.full((4,), -torch.inf)))
    )


def test_verify_refuses_a_target_that_there_is_not(honest, tmp_path, capsys):
    from effc.compiler.cli.main import main

    shutil.copytree(honest / "compact", tmp_path / "compact")
    manifest = tmp_path / "compact" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"kind": "../../x"}))
    assert main(["verify", str(tmp_path / "compact")]) == 5
    assert "artifact-broken" in capsys.readouterr().err
