"""Print what `lower.mixed` loses beside single formats of no more bytes, on two texts that no pass saw, as a table.

    python -m bench.mixed [--model 'zoo("tiny-llama")'] [--json FILE]

Points: every format of the target `native` for the whole model, with and without GPTQ, and int8 with zeros; then
`lower.mixed` at several budgets of bytes, with all its options, with formats alone ("bits") and with zeros alone.
"lower" is by how much the divergence of a mixed point is below that of the best single technique of no more bytes.
The texts: `text.heldout`, and the repository's licence, which is like nothing that the embedded model was trained on.
"""

import argparse
import json
import tempfile
from pathlib import Path

from effc.compiler.driver import api

from bench.tables import markdown
from bench.tables import mixed_format_rows as table

ROOT = Path(__file__).parents[1]
RECIPE = """effspec 1
use std.text
model base = {model}
data unlike = text("{unlike}", samples: 8, length: 128, seed: 7)
pipeline point(base) {{ {steps} }}
expect point {{
  bytes <= 100 * base
  divergence(text.heldout) <= 100
  divergence(unlike) <= 100
}}
emit point {{ native("point"{arguments}) }}
"""
GPTQ = "codes = quantize.gptq(data: text.calib, group: {0})"
SPARSE = (
    "thin = sparsify.sparsegpt(sparsity: {0}% of weights, data: text.calib)"
    "  cpu = lower.sparse_cpu(format: sparse_int8, data: text.calib)"
)
SINGLES = {
    "int8": ("", ", weights: int8"),
    "int8/int16": ("", ", weights: int8, inputs: int16"),
    **{f"int4, group {g}": ("", f", weights: int4, group: {g}") for g in (32, 64)},
    **{f"int4, group {g}, gptq": (GPTQ.format(g), f", weights: int4, group: {g}") for g in (32, 64)},
    **{f"sparse int8, {z} % zeros": (SPARSE.format(z), "") for z in (30, 50, 65, 75)},
}
KEEPS = (15, 17, 20, 24)  # percent of the bytes of float32
KINDS = {
    "all": "",
    "bits": ", formats: [dense_bf16, dense_int8_int16, dense_int8, dense_int4]",
    "zeros": ", formats: [dense_int8, sparse_int8], zeros: [30% of weights, 50% of weights, 65% of weights]",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default='zoo("tiny-llama")', help="as a recipe writes it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        singles = {title: bytes_and_divergences(folder, args.model, *point) for title, point in SINGLES.items()}
        mixed = {}
        for kind, options in KINDS.items():
            for keep in KEEPS:
                step = f"cpu = lower.mixed(keep: {keep}% of bytes, data: text.calib{options})"
                point = bytes_and_divergences(folder, args.model, step, ", weights: int4")
                if point:
                    mixed[f"mixed ({kind}), {keep} %"] = point
    points = {"singles": singles, "mixed": mixed}
    if args.json:
        args.json.write_text(json.dumps(points, indent=1) + "\n")
    print("\n" + markdown(table(points)))


def bytes_and_divergences(folder: Path, model: str, steps: str, arguments: str) -> tuple[float, float, float] | None:
    """Bytes, and the divergences on both texts in nats a token; None of what is refused."""
    from effc.dsl.syntax.diagnostics import Reject

    file = folder / "point.effspec"
    file.write_text(RECIPE.format(model=model, unlike=ROOT / "LICENSE", steps=steps, arguments=arguments))
    try:
        (result,) = api.compile(file, folder / "out", force=True, cache_dir=folder / "cache")
    except Reject as rejection:
        print(f"refused: {steps} {rejection.diagnostics[0].message}", flush=True)
        return None
    values = {m.metric: m.compiled for m in result.artifacts[0].manifest.measures}
    row = values["bytes"], values["divergence(text.heldout)"], values["divergence(unlike)"]
    print(f"{steps or arguments}: {row}", flush=True)
    return row


if __name__ == "__main__":
    main()
