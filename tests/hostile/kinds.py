"""One honest artifact of each kind, small, and by which verbs it is opened: one line a kind.

`python -m tests.hostile.kinds` compiles those that `tests/stored/kinds.tar.xz` holds, and writes it anew.
"""

import json
import shutil
import tarfile
import tempfile
from pathlib import Path

from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.checkpoints.model_folder import origin_of_folder
from effc.compiler.targets.hf import Hf

from tests import tiny, worlds
from tests.drafts import write_artifact

STORED = Path(__file__).parents[1] / "stored"
COMPILED = {"compact": "hf", "native": "cpu", "program": "program"}  # of the artifacts that 8d012cb wrote
FRONTS = ("front", "family", "adapters")  # of steps, of choices of widths and layers, and of ranks
EMITTED = (*FRONTS, "peft", "reft", "flower", "rttc", "onnx", "gguf", "int4", "mixture")
KINDS = (*COMPILED, "stock", *EMITTED)
RECIPE = """effspec 1
model base = hf("./m")
model moe = hf("./moe")
data  rows = synthetic(4, length: 12, seed: 1)
pipeline sizes(base) {
  thin  = prune.channels(keep: 66% of channels, align: 8)
  slim  = prune.channels(keep: 34% of channels, align: 8, from: base)
  front = search.front(points: [thin, slim], measure: [params])
}
emit sizes { front("front") }
pipeline tuned(base) { apart = tune.heal(data: rows, steps: 2, batch: 2, lr: 1e-2, merge: false) }
emit tuned { peft("peft") }
pipeline edited(base) { put = reft.insert(rank: 2) }
emit edited { reft("reft", base: inside) }
pipeline shared(base) { }
emit shared { flower("flower", data: rows, clients: 2, rounds: 1, steps: 1, batch: 2, rank: 2) }
pipeline talk(base) { }
pipeline others(base) { less = prune.channels(keep: 66% of channels, align: 8) }
emit others {
  onnx("onnx")
  gguf("gguf", type: f16)
}
pipeline four(base) { less = prune.channels(keep: 66% of channels, align: 8) }
emit four { native("int4", weights: int4, group: 32) }
pipeline experts(moe) { }
emit experts { native("mixture") }
pipeline drawn(base) {
  net   = supernet.elastic(channels: [100%, 50%], depth: layers, data: rows, steps: 0)
  front = search.random(measure: [params], evals: 6, points: 2)
}
emit drawn { front("family") }
pipeline lora(base) {
  net   = supernet.lora(data: rows, ranks: [4, 2], steps: 2, batch: 2)
  front = search.random(measure: [perplexity(rows), params], evals: 3, points: 2)
}
emit lora { front("adapters") }
emit talk { rttc("rttc", knowledge: "kb.jsonl", policy: rag, rank: 2, epochs: 1) }
"""


def honest(folder: Path) -> Path:
    """A folder with one artifact of each kind, under its name."""
    made = folder / "kinds"
    for name in ("8d012cb", "kinds"):
        with tarfile.open(STORED / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    for kind, name in COMPILED.items():
        shutil.copytree(folder / "8d012cb" / "out" / name, made / kind)
    source = folder / "source"
    source.mkdir()
    worlds.llama(source)
    worlds.tokenizer(source, chat="{% for m in messages %}{{ m.content }}{% endfor %}")
    ctx = worlds.context(folder)
    ctx.origin = origin_of_folder(source, "here", "auto", ctx.settings)
    program = capture(ctx.origin.load())

    def build(draft):
        Hf(path="a").emit(program, draft, ctx)
        return Manifest("hf", name="lean")

    write_artifact(made / "stock", build=build)
    return made


def world(folder: Path) -> Path:
    """The recipe of the kinds that are stored, with its model and its samples."""
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    worlds.llama(folder / "m", **narrow, max_position_embeddings=320)
    worlds.tokenizer(folder / "m", chat="{% for m in messages %}{{ m.content }}{% endfor %}")
    sizes = {"vocab_size": worlds.VOCABULARY, "head_dim": 8, "num_hidden_layers": 2, "num_local_experts": 3}
    tiny.model("mixtral", **narrow, **sizes).save_pretrained(folder / "moe")
    worlds.tokenizer(folder / "moe")
    samples = [{"question": f"which {n}?", "answer": f"it is {n}."} for n in range(12)]
    (folder / "kb.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "r.effspec").write_text(RECIPE)
    return folder / "r.effspec"


def main() -> None:
    from effc.compiler.driver import api

    with tempfile.TemporaryDirectory() as scratch:
        recipe, out = world(Path(scratch)), Path(scratch, "out")
        api.compile(recipe, out=out, cache_dir=Path(scratch, "cache"))
        with tarfile.open(STORED / "kinds.tar.xz", "w:xz") as archive:
            for file in sorted(
                f for kind in EMITTED for f in out.glob(f"**/{kind}") if (f / "manifest.json").is_file()
            ):
                archive.add(file, f"kinds/{file.name}")


if __name__ == "__main__":
    main()
