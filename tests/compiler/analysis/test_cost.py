"""What `plan` says of time, memory and disk: from the machine's speeds, for every step and target, and what is refused."""

import json

import pytest
import torch
from effc.compiler.analysis.planning.free_space import refuse_insufficient_space_or_memory
from effc.compiler.core import speed_cache as kept
from effc.compiler.core.cache import Cache, canonical_json_sha256
from effc.compiler.core.speeds import Speeds, measure_machine_speeds
from effc.compiler.driver import api
from effc.compiler.transforms.lowering import racing
from effc.dsl.syntax.diagnostics import Reject

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SLOW = Speeds(*[1e6] * 10, disk=1e6, start=1.0, measured=True)  # a million of everything in a second
RECIPE = """effspec 1
model base = config("tiny.json", seed: 1)
data  rows = synthetic(2, length: 16, seed: 1)
pipeline lean(base) {{
  s = {step}
}}
emit lean {{ {target} }}
"""


@pytest.fixture
def told(tmp_path):
    """The plan of a step and a target on a machine of these speeds."""
    torch.set_num_threads(1)
    (tmp_path / "cache").mkdir()
    kept.store_speeds(tmp_path / "cache", SLOW)

    def plan(step, target='hf("out")', layers=2):
        (tmp_path / "tiny.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        (tmp_path / "r.effspec").write_text(RECIPE.format(step=step, target=target))
        (made,) = api.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "cache", threads=1)
        return made

    yield plan
    kept.cached_or_measured_speeds.cache_clear()


STEPS = [
    "sparsify.magnitude(sparsity: 50% of weights)",
    "sparsify.wanda(sparsity: 50% of weights, data: rows)",
    "sparsify.sparsegpt(sparsity: 50% of weights, data: rows)",
    "quantize.round()",
    "prune.channels(keep: 50% of channels)",
    "prune.multi(remove: 10% of params, group: 32, score: perplexity(rows))",
    "lower.sparse_cpu(data: rows)",
]


@pytest.mark.parametrize("step", STEPS)
def test_no_step_is_free_and_twice_the_layers_take_about_twice_as_long(told, step):
    two, four = told(step).stages[0], told(step, layers=4).stages[0]
    grown = four.before.params / two.before.params
    assert two.seconds > two.before.bytes / 1e6, "at least its weights are hashed"
    assert grown / 1.6 < four.seconds / two.seconds < 4 * grown  # what is scored grows with the square


def test_a_race_of_small_weights_is_estimated_by_the_copies_that_are_made(told):
    raced, plain = told("lower.sparse_cpu(data: rows)").stages[0], told(STEPS[1]).stages[0]
    largest = CONFIG["hidden_size"] * CONFIG["vocab_size"]
    assert raced.peak_bytes < plain.peak_bytes + 16 * 256 * 4 * largest  # contenders, copies, bytes of a number


def test_scaling_is_estimated_by_the_factors_that_it_tries_on_every_weight(told):
    scaled = told("quantize.scale(data: rows, bits: 4, group: 32)").stages[0]
    rounded = told("quantize.round(bits: 4, group: 32)").stages[0]
    assert scaled.seconds - rounded.seconds > 20 * 2 * scaled.before.flops / 1e6


@pytest.mark.parametrize("layers", [2, 4])
def test_an_export_to_onnx_takes_seconds_for_every_layer(told, layers):
    plain, exported = (told(STEPS[0], target, layers).emissions[0] for target in ('hf("out")', 'onnx("out")'))
    assert exported.seconds - plain.seconds > layers


@pytest.mark.parametrize("bytes", [1000, 1 << 16])
def test_the_bytes_of_copies_are_those_of_what_is_made(bytes):
    made = racing.cold_copies(lambda: torch.empty(bytes, dtype=torch.uint8), bytes)
    assert sum(copy.nbytes for copy in made) == racing.bytes_of_cold_copies(bytes)


@pytest.mark.parametrize("target", ['hf("out")', 'native("out")', 'native("out", weights: int8)'])
def test_targets_are_part_of_what_a_plan_says(told, target):
    plan = told(STEPS[0], target)
    (made,) = plan.emissions
    each = 1 if "int8" in target else 2 if "native" in target else 4
    numbers = plan.stages[0].after.params
    most = 1.4 if each == 1 else 1.2  # int8 has whole tiles of 64 inputs, and 8 bytes for each of few outputs
    assert each * numbers <= made.weight_bytes < most * each * numbers and made.weight_bytes < made.disk_bytes
    assert made.seconds > made.disk_bytes / 1e6
    assert plan.seconds == made.seconds + plan.stages[0].seconds and plan.peak_bytes >= made.peak_bytes


def test_speeds_are_kept_sealed_and_a_forged_file_is_refused(tmp_path):
    torch.set_num_threads(1)
    (tmp_path / "cache").mkdir()
    kept.store_speeds(tmp_path / "cache", SLOW)
    assert kept.cached_or_measured_speeds(tmp_path / "cache") == SLOW
    path = tmp_path / "cache" / "values" / f"{canonical_json_sha256(kept.speed_key_fields(1))}.json"
    path.write_text(path.read_text().replace("1000000.0", "2000000.0", 1))
    kept.cached_or_measured_speeds.cache_clear()
    with pytest.raises(Reject) as refused:
        kept.cached_or_measured_speeds(tmp_path / "cache")
    assert refused.value.diagnostics[0].slug == "cache-damaged"
    Cache(tmp_path / "cache").store_value(kept.speed_key_fields(1), {"hash": -1.0})
    assert kept.cached_or_measured_speeds(tmp_path / "cache").hash > 0  # looked at instead
    kept.cached_or_measured_speeds.cache_clear()


def test_speeds_are_of_this_machine():
    found = measure_machine_speeds(seconds_each=0.0)
    assert 1e6 < found.hash < 1e12 and 1e6 < found.float32 < 1e15 and not found.measured


def test_what_the_disk_has_no_room_for_is_said_before_the_start(told, tmp_path):
    plan = told(STEPS[0])
    (folder,) = {tmp_path}
    refuse_insufficient_space_or_memory([plan], folder / "out", folder)
    with pytest.raises(Reject) as refused:
        refuse_insufficient_space_or_memory([plan], folder / "out", folder, free_bytes_by_folder={folder: 1000})
    (fault,) = refused.value.diagnostics
    assert fault.slug == "too-large" and fault.exit == 6 and "1000 B are free" in fault.message


def test_files_of_layers_that_lose_alike_are_counted_once(told):
    step = "prune.channels(keep: 50% of channels{})"
    alike = told(step.format("")).emissions[0].disk_bytes
    uneven = told(step.format(", score: perplexity(rows), data: rows")).emissions[0].disk_bytes
    original = told("sparsify.magnitude(sparsity: 50% of weights)").emissions[0].disk_bytes
    assert alike < original and uneven > 1.5 * original
