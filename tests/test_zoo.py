"""The embedded zoo model is a stock folder that plain transformers load, and it is worth pruning."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "recipes" / "zoo" / "tiny-llama"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A model this small gains nothing from more, and on a busy machine their waiting costs seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def card():
    return " ".join((FOLDER / "README.md").read_text().split())


def paragraphs(name):
    return (FOLDER / name).read_text().strip().split("\n\n")


@torch.no_grad()
def perplexity(model, tokenizer, windows, length):
    ids = tokenizer((FOLDER / "heldout.txt").read_text(), return_tensors="pt").input_ids[0]
    rows = ids[1 : 1 + windows * (length - 1)].view(windows, length - 1)
    rows = torch.cat([torch.full((windows, 1), tokenizer.bos_token_id), rows], dim=1)  # [windows, length]
    return math.exp(model(input_ids=rows, labels=rows).loss.item())


def test_the_zoo_model_is_a_plain_llama_with_grouped_heads_and_tied_embeddings(model):
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_perplexity_on_held_out_text_is_far_below_uniform(model, tokenizer):
    assert perplexity(model, tokenizer, windows=20, length=256) < 40  # uniform: 2048


def test_positions_up_to_the_limit_are_trained(model, tokenizer):
    limit = model.config.max_position_embeddings
    short = perplexity(model, tokenizer, windows=10, length=limit // 2)
    assert perplexity(model, tokenizer, windows=5, length=limit) < 1.02 * short  # nearly the same tokens


def test_the_tokenizer_round_trips_the_held_out_text(tokenizer):
    text = (FOLDER / "heldout.txt").read_text()
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_padding_on_the_left_leaves_the_next_token_alone(model, tokenizer):
    prompts = ["And it came to pass", "In the beginning God created the heaven and"]
    padded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    singles = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    with torch.no_grad():
        together = model(**padded).logits[:, -1]
        alone = torch.cat([model(**single).logits[:, -1] for single in singles])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)  # 1e-4: float32 sums in another order


def test_the_card_agrees_with_the_config_and_the_files(model, tokenizer, card):
    c = model.config
    heads = f"{c.num_attention_heads} query and {c.num_key_value_heads} key/value heads of {c.head_dim}"
    texts = [f"{(FOLDER / name).stat().st_size:,} bytes" for name in ("calib.txt", "heldout.txt")]
    for fact in (
        f"{model.num_parameters():,} parameters",
        f"{len(tokenizer):,} entries",
        heads,
        *texts,
        f"{c.num_hidden_layers} layers",
        f"hidden {c.hidden_size}",
        f"MLP {c.intermediate_size}",
        "public domain",
        "Apache-2.0",
        "train_tiny_llama.py",
        "seed",
        "steps",
    ):
        assert fact in card, fact


@pytest.mark.slow
def test_the_card_states_the_held_out_perplexity_that_the_weights_have(model, tokenizer, card):
    length, nats, stated = re.search(r"\| heldout.txt \| (256) \| ([\d.]+) \| ([\d.]+) \|", card).groups()
    assert float(stated) == pytest.approx(math.exp(float(nats)), rel=1e-2)  # three decimals of nats
    count = (len(tokenizer((FOLDER / "heldout.txt").read_text()).input_ids) - 1) // (int(length) - 1)
    assert perplexity(model, tokenizer, count, int(length)) == pytest.approx(float(stated), rel=1e-2)


def test_no_held_out_paragraph_occurs_in_the_calibration_text():
    calibration = (FOLDER / "calib.txt").read_text()
    for paragraph in paragraphs("heldout.txt"):
        assert paragraph not in calibration
        assert all(sentence not in calibration for sentence in paragraph.split(".") if len(sentence) > 60)


def test_the_folder_stays_under_ten_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000


@pytest.mark.parametrize(
    ("name", "kind", "facts"),
    [
        ("tiny-mamba2", "Mamba2ForCausalLM", ("8 scan heads of 32", "1 group")),
        ("tiny-hybrid", "BambaForCausalLM", ("layers 2 and 5 attend", "4 key/value heads")),
    ],
)
def test_the_state_space_models_share_the_tokenizer_and_are_worth_shedding(tokenizer, name, kind, facts):
    folder = FOLDER.with_name(name)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    card = " ".join((folder / "README.md").read_text().split())
    assert type(model).__name__ == kind and model.lm_head.weight is model.get_input_embeddings().weight
    assert (folder / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()
    assert perplexity(model, tokenizer, windows=12, length=256) < 60  # uniform: 2048
    for fact in (f"{model.num_parameters():,} parameters", "train_tiny_ssm.py", "Training loss", "steps", *facts):
        assert fact in card, fact
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
