"""The same tokens through the original, the program in memory and every form."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts.form_losses import Account, account_rows, merge_accounts
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.driver.api import compile
from effc.compiler.driver.judging.accounting import CACHE_BYTES, Accounting, RecordedLogits, _row_count
from effc.compiler.plugin.target import Form
from torch import nn
from torch.nn import functional

WORDS = 11


class Words(nn.Module):
    """Logits that follow from the token alone."""

    def __init__(self, seed: int):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(
            torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed)), freeze=False
        )

    def forward(self, input_ids):
        return self.table(input_ids)


@pytest.fixture
def accounting() -> Accounting:
    text = torch.randint(WORDS, (3, 7), generator=torch.Generator().manual_seed(5))
    made = Accounting(text, "calib")
    made.on_original(Words(0))
    return made


def test_rows_are_what_torch_computes_of_the_same_logits(accounting, tmp_path):
    ours, form = Words(1), Words(2)
    heard = RecordedLogits(accounting, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_bytes(b"x" * 123)
    heard.program("", ours)(Form("out", "effc"), form(accounting.text).detach())
    original, program, written = heard.make_accounts()
    logs = [m(accounting.text).flatten(0, 1).log_softmax(-1).detach() for m in (Words(0), ours, form)]

    def kl(truth, other):
        return functional.kl_div(other, truth, log_target=True, reduction="batchmean").item()

    assert (original.divergence, original.agreement, original.drift) == (0.0, 1.0, None)
    assert program.divergence == pytest.approx(kl(logs[0], logs[1]), rel=1e-5) and program.drift is None
    assert written.divergence == pytest.approx(kl(logs[0], logs[2]), rel=1e-5)
    assert written.drift == pytest.approx(kl(logs[1], logs[2]), rel=1e-5)
    assert program.agreement == pytest.approx((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean().item())
    said = ours(accounting.text)[:, :-1].flatten(0, 1)
    assert program.perplexity == pytest.approx(
        functional.cross_entropy(said, accounting.text[:, 1:].flatten()).exp().item()
    )
    assert (original.bytes, written.bytes, written.tokens) == (4 * WORDS * WORDS, 123, 21)
    assert [a.what for a in (original, program, written)] == ["original", "in memory", "out"]


def test_random_tokens_have_no_perplexity(accounting, tmp_path):
    accounting.of = ""
    heard = RecordedLogits(accounting, tmp_path)
    heard.program("", Words(1))(Form("out", "effc"), Words(1)(accounting.text).detach())
    assert {a.perplexity for a in heard.make_accounts()} == {None}
    assert heard.make_accounts()[0].where == "21 random tokens"


def test_an_artifact_without_forms_has_no_account(accounting, tmp_path):
    heard = RecordedLogits(accounting, tmp_path)
    heard.program("", Words(1))
    assert heard.make_accounts() == () == RecordedLogits(Accounting(None), tmp_path).make_accounts()


@pytest.mark.parametrize("words", [50, 50_000, 300_000])
def test_logits_of_the_tokens_stay_small_however_many_words_there_are(words):
    text = _row_count(torch.zeros(100, 1000, dtype=torch.int64), words)
    assert text.shape[1] == 64 and (len(text) == 1 or 4 * text.numel() * words <= CACHE_BYTES)


def test_what_several_artifacts_share_is_told_once():
    shared = [Account("original", 0.0, None, 1.0, 9.0, 8, 4), Account("in memory", 0.1, None, 0.9, 9.5, 6, 4)]
    form = Account("compact", 0.1, 0.0, 0.9, 9.5, 7, 4)
    both = merge_accounts({"a": (*shared, form), "b": (*shared, replace(form, what="native", drift=2e-5))})
    assert [row.what for row in both] == ["original", "in memory", "a: compact", "b: native"]
    head, *rows = account_rows(both)
    assert all(len(row) == len(head) for row in rows)
    assert rows[3] == ("b: native", "0.1000", "2e-05", "90.0 %", "9.5", "7 B")


def test_accounts_are_kept_where_no_hash_covers_them():
    account = Account("compact", 0.1, float("nan"), 0.9, None, 7, 4, "calib")
    manifest = Manifest("hf", profile={}).with_measures(accounts=(account,))
    steady, measured = (json.loads(json.dumps(d)) for d in (manifest.to_json(), manifest.measures_json()))
    assert "accounts" not in steady
    assert Manifest.from_json(steady, measured).accounts == (replace(account, drift=None),)


RECIPE = """effspec 1
use std.text
model base = zoo("tiny-llama")
pipeline small(base) { thin = prune.channels(keep: 50% of channels, data: text.calib) }
expect small { perplexity(text.heldout) <= 9 * base }
emit small { hf("hf")  native("cpu")  pt2("program") }
"""


@pytest.mark.heavy
def test_forms_agree_with_memory_and_all_with_one_original(tmp_path: Path):
    (tmp_path / "r.effspec").write_text(RECIPE)
    (made,) = compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    manifests = [a.manifest for a in made.artifacts]
    for manifest in manifests:
        original, program, *forms = manifest.accounts
        assert (original, program) == manifests[0].accounts[:2]
        assert program.divergence > 0.01 and forms and all(0 <= form.drift < 1e-3 for form in forms)
        assert all(form.divergence == pytest.approx(program.divergence, abs=0.01) for form in forms)
        assert original.data == "text.heldout" and original.tokens == 256
