"""Files of the contestants of frontier.py: effc's from recipes, llama.cpp's by its own quantiser, others' by rivals.py."""

import os
import subprocess
from pathlib import Path

from bench import rivals, smol

ROUND = "q = quantize.round(group: 32)"
PUBLISHED = "q = quantize.gptq(group: 32, data: calib, scales: range, order: given, sweeps: 0)"
GPTQ = "q = quantize.gptq(group: 32, data: calib)"
SCALE = "s = quantize.scale(group: 32, data: calib)"
EIGHT = "s = quantize.scale(bits: 8, group: 0, zero: middle, scales: range, inputs: int8, data: calib)"
EIGHT_OF_WEIGHTS = "s = quantize.scale(bits: 8, group: 0, zero: middle, scales: range, data: calib)"
ZEROS = "sps = sparsify.admm(sparsity: {}% of weights, data: calib)"
THIN = "cut = prune.multi(remove: 10% of params, group: 128, score: perplexity(calib), estimate: taylor, together: 8)"
HEAL = "fit = tune.heal(data: train, method: full, steps: {0}, batch: 4, lr: 5e-5, save: 20)"
NATIVE_VARIANTS = {  # name -> steps, numbers of linear layers, kernel of the projections
    "own bf16": ((), "bf16", ""),
    "own int8": ((), "int8", ""),
    "own int8, scaled": ((EIGHT,), "int8", ""),
    "own int8, int16 inputs": ((), "int8_int16", ""),
    "own int8, int16 inputs, scaled": ((EIGHT_OF_WEIGHTS,), "int8_int16", ""),
    "own int4, rounded": ((ROUND,), "int4", ""),
    "own int4, published gptq": ((PUBLISHED,), "int4", ""),
    "own int4, gptq": ((GPTQ,), "int4", ""),
    "own int4, scaled, rounded": ((SCALE, ROUND), "int4", ""),
    "own int4, scaled, gptq": ((SCALE, GPTQ), "int4", ""),
    "own bf16, trained": ((HEAL,), "bf16", ""),
    "own int8, trained": ((HEAL,), "int8", ""),
    "own int8, trained, scaled": ((HEAL, EIGHT), "int8", ""),
    "own int8, int16 inputs, trained": ((HEAL,), "int8_int16", ""),
    "own int8, 30% zeros, trained": ((ZEROS.format(30), HEAL), "int8", "sparse_linear_int8"),
    "own int8, 50% zeros, trained": ((ZEROS.format(50), HEAL), "int8", "sparse_linear_int8"),
    "own int8, 60% zeros, trained": ((ZEROS.format(60), HEAL), "int8", "sparse_linear_int8"),
    "own int8, pruned 10%, trained": ((THIN, HEAL), "int8", ""),
}
LLAMA = {f"llama.cpp {kind.lower()}": kind for kind in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL")}
IMATRIX = {f"llama.cpp {kind}, imatrix": kind for kind in ("q5_k", "q4_k", "iq4_nl")}  # target `gguf`, data: calib
IK = {f"ik_{name}": name for name in LLAMA}  # reads the file of


def files_of(folder: Path, name: str) -> Path:
    name = IK.get(name, name)
    return folder / "frontier" / name.replace(" ", "-").replace(",", "").replace("%", "")


def write_native(folder: Path, name: str, steps: int) -> None:
    from effc.compiler.ir.layers.linear import KernelLinear
    from effc.compiler.runtimes.native import plan_files
    from effc.compiler.runtimes.native.emission import native_artifact_facts
    from effc.compiler.runtimes.native.linears import NumberFormats
    from effc.compiler.runtimes.native.reader import Reader

    recipe_steps, weights, kernel = NATIVE_VARIANTS[name]
    words = "\n  ".join(recipe_steps).format(steps)
    build = smol.build_of(folder, files_of(folder, name).name, words, model=smol.base(folder, "bfloat16"), seed=0)
    program = smol.finished(build)
    model = program.model
    for path, module in list(model.named_modules()) if kernel else []:
        if path.endswith("_proj"):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, KernelLinear.of(module, kernel))
    target = files_of(folder, name)
    target.mkdir(parents=True)
    program.changed()
    plan_files.write_plan(
        Reader(program, NumberFormats(weights, 32)).build_plan(), target, native_artifact_facts(model, weights)
    )


def write_llama_cpp_quant(folder: Path, name: str) -> None:
    """A file of one of llama.cpp's forms, by its own quantiser from float16."""
    import llama_cpp as api
    from effc.compiler.runtimes.gguf.writing import write_gguf_and_notes

    from bench.decoders import silent_llama

    whole = folder / "frontier" / "model.gguf"
    if not whole.exists():
        build = smol.build_of(folder, "frontier", "", model=smol.base(folder))
        write_gguf_and_notes(build.ctx.origin.load(), whole.parent, "f16", build.ctx.tokenizer)
    target = files_of(folder, name)
    target.mkdir()
    options = api.llama_model_quantize_default_params()
    options.nthread = 1
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{LLAMA[name]}")
    with silent_llama():
        status = api.llama_model_quantize(str(whole).encode(), str(target / "model.gguf").encode(), options)
    assert status == 0, f"no {name} file"


def write_gguf_by_importance(folder: Path, name: str) -> None:
    """A file by llama.cpp's quantiser with an importance matrix of the rows that effc's points are calibrated on."""
    from effc.compiler.ir.capture.capture import capture
    from effc.compiler.runtimes.gguf.importance import input_importance_by_gguf_name
    from effc.compiler.runtimes.gguf.writing import write_gguf_and_notes
    from effc.dsl.checker.values import DataRef

    ctx = smol.build_of(folder, "importance", "", model=smol.base(folder)).ctx
    program = capture(ctx.origin.load())
    target = files_of(folder, name)
    target.mkdir()
    importance = input_importance_by_gguf_name(program, ctx.rows(DataRef("calib")))
    write_gguf_and_notes(program.model, target, IMATRIX[name], ctx.tokenizer, importance)


def write_rival(folder: Path, name: str) -> None:
    environment = Path(os.environ["RIVALS_PYTHON"]).parent
    command = [
        str(environment / "python"),
        "-m",
        "bench.rivals",
        "write",
        name,
        str(folder),
        str(files_of(folder, name)),
    ]
    subprocess.run(command, check=True, env=os.environ | {"PATH": f"{environment}:{os.environ['PATH']}"})


def write_contestant_if_absent(folder: Path, contestant: str, training_steps: int) -> None:
    """What that contestant opens, where it is not there yet; effc's trained points take so many steps of training."""
    if files_of(folder, contestant).exists():
        return
    if contestant in NATIVE_VARIANTS:
        write_native(folder, contestant, training_steps)
    elif contestant in IMATRIX:
        write_gguf_by_importance(folder, contestant)
    elif contestant in rivals.RIVALS:
        write_rival(folder, contestant)
    else:
        write_llama_cpp_quant(folder, IK.get(contestant, contestant))


def bytes_of(folder: Path, name: str) -> int:
    """Bytes of weights; of torchao, which packs as it opens, those of the checkpoint."""
    suffixes = (".gguf", ".bin", ".data", ".onnx", ".safetensors")
    return sum(
        f.stat().st_size for f in files_of(folder, name).glob("*") if f.suffix in suffixes and "token" not in f.name
    )
