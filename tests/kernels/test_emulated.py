"""The kernels for ARM under qemu: which level a processor gets, and the numbers of this machine's kernels."""

from collections.abc import Iterator

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.plan_files import write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.kernels import levels
from effc.kernels.ops import KERNELS
from transformers import AutoModelForCausalLM

from tests.kernels.emulated.library import ROOT, EmulatedLibrary, build, kernels_of
from tests.kernels.layers import LINEAR, assert_close, run, weight

pytestmark = pytest.mark.slow
PROMPT, TOKENS = [1, 40, 300, 17, 900, 33, 5, 208, 61], 6
SHARES = {"bf16": 2**-6, "int8": 2**-4, "int8_int16": 2**-5, "int4": 2**-4}  # of the largest logit, as in test_engine


@pytest.fixture(scope="module")
def older_processor(emulated_library) -> Iterator[EmulatedLibrary]:
    """The same library on a Cortex-A53, an ARMv8.0 without dot products."""
    library = EmulatedLibrary(build(ROOT / "build" / "aarch64"), "cortex-a53")
    yield library
    library.close()


def test_a_processor_without_dot_products_runs_the_portable_level(older_processor):
    with kernels_of(older_processor):
        assert levels.available_levels() == ("portable",)
        assert levels.level_unavailability_reason("neon").startswith("this machine lacks NEON with dot products")
        with levels.at_forced_level("portable"):
            for kernel in LINEAR:
                own = KERNELS[kernel].pack(weight(33, 200, 0.5))
                for rows in (1, 9):
                    x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows))
                    assert_close(run(kernel, x, own, None, 33), KERNELS[kernel].reference(x, own, None, 33))


@pytest.mark.parametrize("kernel", [name for name in LINEAR if "int" in name])
def test_exact_sums_are_those_of_this_machine_to_the_bit(kernel, emulated_library):
    w = weight(70, 1100, 0.5)
    own = KERNELS[kernel].pack(w)
    with kernels_of(emulated_library), levels.at_forced_level("neon"):
        assert torch.equal(KERNELS[kernel].pack(w), own)
    for rows in (1, 2, 5, 8, 15):  # 16 rows of int4 are bfloat16 on AMX
        x = torch.randn(rows, 1100, generator=torch.Generator().manual_seed(rows))
        x[:, 7] *= 100  # an input that keeps 16 bits
        expected = run(kernel, x, own, None, 70)
        with kernels_of(emulated_library), levels.at_forced_level("neon"):
            assert torch.equal(run(kernel, x, own, None, 70), expected), rows


def greedy(folder) -> tuple[list[int], torch.Tensor]:
    """Tokens that the engine chooses behind the prompt, and the logits of all positions."""
    model = open_native(folder, threads=1, max_sequences=1)
    logits = [model.engine.run(PROMPT, [0] * len(PROMPT))]
    tokens: list[int] = []
    for _ in range(TOKENS):
        tokens.append(int(logits[-1][-1].argmax()))
        logits.append(model.engine.run(tokens[-1:], [0]))
    return tokens, torch.cat(logits)


@pytest.mark.parametrize("numbers", SHARES)
def test_an_artifact_that_was_written_here_says_the_same_tokens_there(numbers, emulated_library, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "recipes" / "zoo" / "tiny-llama", dtype=torch.float32)
    facts = {"class": "LlamaForCausalLM", "model_type": "llama", "params": 1}
    write_plan(Reader(capture(model), numbers).build_plan(), tmp_path, facts)
    expected, expected_logits = greedy(tmp_path)
    with kernels_of(emulated_library), levels.at_forced_level("neon"):
        tokens, logits = greedy(tmp_path)
    assert tokens == expected
    assert float((logits - expected_logits).abs().max()) <= SHARES[numbers] * float(expected_logits.abs().max())
