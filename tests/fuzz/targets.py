"""Readers of what may come from anybody, each as one call on bytes: it returns, or refuses with a diagnostic."""

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from effc.compiler.artifacts import exported
from effc.compiler.artifacts.manifest import read_manifest
from effc.compiler.core.safe_read import parse_strict_json
from effc.compiler.inputs.sources.gguf import read_tensor_shapes
from effc.compiler.ir import graph_json
from effc.compiler.models.checkpoints.safetensors_header import read_safetensors_header
from effc.compiler.runtimes.native import opening, plan_files
from effc.compiler.runtimes.onnx import checking
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source
from effc.kernels import engine_plan, packed
from effc.kernels.native import KernelError

from tests.fuzz import records

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """
    seeds   honest inputs, made in a folder
    read    reads one input; the folder is its own
    """

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[bytes, Path], None]


def _recipes(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((ROOT / "recipes").rglob("*.effspec"))[:6]]


def _recipe(data: bytes, folder: Path) -> None:
    parse(Source("fuzz.effspec", data.decode(errors="replace")))


def _config(honest: Path) -> dict:
    return json.loads((honest / "compact" / "compact" / "config.json").read_bytes())


def _graphs(honest: Path) -> list[bytes]:
    entry = next(iter(_config(honest)["effc"]["edits"]["graphs"].values()))
    return [json.dumps(entry["graph"]).encode()]


def _graph(data: bytes, folder: Path) -> None:
    try:
        body = parse_strict_json(data)
    except ValueError:
        return
    graph_json.graph_from_json(body)


def _manifests(honest: Path) -> list[bytes]:
    return [(honest / kind / "manifest.json").read_bytes() for kind in ("compact", "front")]


def _manifest(data: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(data)
    read_manifest(folder)


def _buffers(honest: Path) -> list[bytes]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 150, generator=generator) * (torch.rand(40, 150, generator=generator) < 0.5)
    return [bytes(packed.pack(kernel, weight).numpy()) for kernel in ("dense_linear", "sparse_linear")]


def _buffer(data: bytes, folder: Path) -> None:
    if data:
        tensor = packed.allocate_zero_bytes(len(data))
        tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        packed.check_packed_weight(packed.kernel_of(tensor) or "dense_linear", tensor)


def _plans(kind: str) -> Callable[[Path], list[bytes]]:
    def plans(honest: Path) -> list[bytes]:
        native = honest / kind / "native"
        _weights[kind] = (native / "weights.bin").read_bytes()
        return [(native / "plan.json").read_bytes()]

    return plans


_weights: dict[str, bytes] = {}


def _plan(kind: str) -> Callable[[bytes, Path], None]:
    def plan(data: bytes, folder: Path) -> None:
        (folder / "plan.json").write_bytes(data)
        if not (folder / "weights.bin").exists():
            (folder / "weights.bin").write_bytes(_weights[kind])
        found = plan_files.read_plan(folder)
        engine_plan.check_plan_and_weights(
            found.plan, plan_files.load_weights(folder, found, mapped=True), compares_checksums=True
        )
        if "EFFC_KERNELS" in os.environ:  # a build that is watched: what was taken must compute, too
            opening.open_native(folder, threads=1, max_sequences=1)(torch.tensor([[1, 2, 3]]))

    return plan


def _ggufs(honest: Path) -> list[bytes]:
    import gguf

    file = honest / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_token_list(["a", "bc", "</s>"])
    writer.add_tensor("token_embd.weight", torch.ones(3, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [file.read_bytes()]


def _gguf(data: bytes, folder: Path) -> None:
    (folder / "x.gguf").write_bytes(data)
    read_tensor_shapes(folder / "x.gguf", "x")


def _headers(honest: Path) -> list[bytes]:
    return [next((honest / "stock" / "model").glob("*.safetensors")).read_bytes()]


def _header(data: bytes, folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(data)
    read_safetensors_header(folder / "x.safetensors")


def _archives(honest: Path) -> list[bytes]:
    whole = honest / "program" / "program" / "model.pt2"
    with zipfile.ZipFile(whole) as archive:
        texts = [archive.read(name) for name in archive.namelist() if name.endswith("models/model.json")]
    assert texts, "an exported program holds its graph"
    return [whole.read_bytes()]


def _archive(data: bytes, folder: Path) -> None:
    (folder / exported.FILE).write_bytes(data)
    exported.check_exported_folder(folder)


def _graphs_of_onnx(honest: Path) -> list[bytes]:
    folder = honest / "onnx" / "onnx"
    _data.append((folder / checking.DATA).read_bytes() if (folder / checking.DATA).exists() else b"")
    return [(folder / checking.FILE).read_bytes()]


_data: list[bytes] = []


def _onnx(data: bytes, folder: Path) -> None:
    (folder / checking.FILE).write_bytes(data)
    (folder / checking.DATA).write_bytes(_data[0])
    checking.load_initializers(folder, checking.read_checked_onnx(folder))


TARGETS = {
    "recipe": Target(_recipes, _recipe),
    "graph": Target(_graphs, _graph),
    "manifest": Target(_manifests, _manifest),
    "packed": Target(_buffers, _buffer),
    "plan": Target(_plans("native"), _plan("native")),
    "int4": Target(_plans("int4"), _plan("int4")),
    "mixture": Target(_plans("mixture"), _plan("mixture")),
    "gguf": Target(_ggufs, _gguf),
    "safetensors": Target(_headers, _header),
    "pt2": Target(_archives, _archive),
    "onnx": Target(_graphs_of_onnx, _onnx),
    "import": Target(records.imports, records.read_import),
    "lock": Target(records.locks, records.read_lock),
    "package": Target(records.abouts, records.read_about),
    "baseline": Target(records.baselines, records.read_baseline),
    "federation": Target(records.declarations, records.read_federation),
    "app": Target(records.apps, records.read_the_app),
    "knowledge": Target(records.bases, records.read_base),
    "answer": Target(records.answers, records.read_answer),
    "step": Target(records.steps, records.read_step),
}
REFUSALS = (Reject, KernelError)
