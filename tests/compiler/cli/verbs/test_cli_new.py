"""`effc new`: recipes for models of every kind, which check as they were written."""

from pathlib import Path
from types import SimpleNamespace

from effc.compiler.cli.verbs.new import choose_evaluation, source_expression
from effc.compiler.models.checkpoints.origin import max_row_tokens

from tests import worlds

NET = '''"""Four layers of a plain net, and what it takes."""
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.dummy_inputs = {"x": torch.randn(2, 3, 16)}

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def make():
    return Net()
'''


def test_configs_and_modules_get_recipes_that_check(effc, tmp_path):
    worlds.llama(tmp_path / "mine")
    (tmp_path / "net.py").write_text(NET)
    for place, named, judged, file in (
        ("mine/config.json", 'config("./mine/config.json")', "perplexity(calib)", "mine-smaller.effspec"),
        ("net.py:make", 'module("./net.py:make")', "similarity(calib)", "make-smaller.effspec"),
    ):
        run = effc("new", place, "--trust-remote-code")
        assert run.code == 0 and run.out.strip() == file, run.err
        text = (tmp_path / file).read_text()
        assert f"model base = {named}" in text and judged in text and "data calib = synthetic(" in text
        assert effc("check", file, "--resolve", "--trust-remote-code").code == 0
        assert effc("fmt", "--check", file).code == 0


def test_code_is_run_only_where_that_is_allowed_and_goals_of_text_need_a_tokenizer(effc, tmp_path):
    worlds.llama(tmp_path / "mine")
    (tmp_path / "net.py").write_text(f"{NET}\n\nraise SystemExit('ran')\n")
    run = effc("new", "net.py:make")
    assert run.code == 5 and run.err.startswith("error[remote-code]") and not list(tmp_path.glob("*.effspec"))
    run = effc("new", "mine", "--goal", "rttc")
    assert run.code == 5 and "goals for it are smaller, faster, gentle, search" in run.err
    assert not list(tmp_path.rglob("*knowledge*")), "a recipe that is refused leaves no knowledge base"


def test_a_gguf_file_is_named_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.Q4_0.gguf").write_bytes(b"GGUF")
    assert source_expression("tiny.Q4_0.gguf", Path()).text == 'gguf("./tiny.Q4_0.gguf")'


def test_what_writes_is_judged_by_perplexity_and_what_encodes_by_similarity():
    reads = SimpleNamespace(tokenizer_identity="x", config={}, positions=512)
    bound = "perplexity(text.heldout) <= 1.50 * base in light"
    assert choose_evaluation(reads, SimpleNamespace(facts={"vocab": 9, "causal_lm": True})).adapt_line(bound) == bound
    encoder = choose_evaluation(reads, SimpleNamespace(facts={"vocab": 9, "causal_lm": False}))
    assert encoder.adapt_line(bound) == "similarity(text.heldout) >= 0.80 in light"


def read_by(config: dict) -> SimpleNamespace:
    positions = max_row_tokens(config)
    return SimpleNamespace(tokenizer_identity="x", config=config, positions=positions, code=False, token_id_count=9)


def test_random_rows_are_no_longer_than_the_positions_wherever_the_config_has_them():
    text_config = {"max_position_embeddings": 77}
    judge = choose_evaluation(
        read_by({"model_type": "clip", "text_config": text_config}), SimpleNamespace(facts={}, stream=None)
    )
    assert "synthetic(count: 16, length: 77, seed: 1)" in judge.lines[1]


def test_an_encoder_of_images_is_not_judged_by_what_a_text_says():
    decoder = {"model_type": "bert", "max_position_embeddings": 512}
    config = {
        "model_type": "vision-encoder-decoder",
        "architectures": ["VisionEncoderDecoderModel"],
        "decoder": decoder,
    }
    judge = choose_evaluation(read_by(config), SimpleNamespace(facts={"vocab": 9}, stream=None))
    assert judge.metric == "similarity" and "synthetic(" in judge.lines[1]
