"""Models whose logits are no numbers are refused where they are talked to, on every runtime."""

import pytest
import torch
from effc.compiler.apps.serving.chat import ChatSession
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.target import LoadRequest
from effc.compiler.targets.gguf import Gguf
from effc.compiler.targets.native import Native
from effc.compiler.targets.onnx import Onnx
from effc.dsl.syntax.diagnostics import EXITS, Reject
from transformers import LlamaForCausalLM

from tests import worlds
from tests.recipes_in_memory import context_of, recipe_of

ODD = "b"
TARGETS = {"native": (Native, {}), "onnx": (Onnx, {}), "gguf": (Gguf, {"type": "bf16"})}
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return worlds.tokenizer(tmp_path_factory.mktemp("words"), start=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return worlds.llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


def broken(folder, tokenizer, value):
    """A model that computes no number behind the token of ODD."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer(ODD)["input_ids"][0], 3] = value
    return model


def opened(runtime, model, tmp_path):
    if runtime == "torch":
        return model
    pytest.importorskip({"onnx": "onnxscript", "gguf": "gguf"}.get(runtime, "torch"))
    kind, options = TARGETS[runtime]
    target = kind(path="m", **options)
    target.emit(capture(model), tmp_path, context_of(tmp_path, model, recipe_of([])))
    form = target.forms()[0]
    return kind.open(tmp_path / form.folder, LoadRequest())[0]


@pytest.mark.parametrize(
    ("runtime", "value"),
    [("torch", torch.nan), ("torch", torch.inf), ("native", torch.inf), ("onnx", torch.nan), ("gguf", torch.nan)],
)
@pytest.mark.slow
def test_a_model_whose_logits_are_no_numbers_is_refused_by_name_and_answers_what_it_can(
    runtime, value, folder, tokenizer, tmp_path
):
    model = opened(runtime, broken(folder, tokenizer, value), tmp_path)
    for temperature in (0.0, 1.0):
        session = ChatSession(model, tokenizer, 4, temperature, label="slim")
        with pytest.raises(Reject, match="slim: the model's logits are NaN or infinite") as caught:
            session.answer(f"a{ODD}", lambda text: None)
        assert caught.value.exit == EXITS["environment"]
