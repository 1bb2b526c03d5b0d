"""Digests of data sets, which baselines, locks, journals and caches of earlier versions hold."""

import importlib
from types import SimpleNamespace

import pytest

DIGESTS = [  # of effc 0.2, of a file that holds one line
    ("chat", {"length": 8}, "de826f1d3b92b49e"),
    ("chat", {"length": 8, "samples": 3}, "36da94070ab5bf7f"),
    ("chat", {"length": 8, "samples": 3, "seed": 2}, "65a7bcdc96a56a27"),
    ("choices", {}, "99d7217271b6548f"),
    ("choices", {"samples": 3}, "0247d947ffd44546"),
    ("choices", {"samples": 3, "seed": 2}, "9ab8d8c6912a15a2"),
    ("images", {}, "18041d1fabffed82"),
    ("images", {"samples": 3}, "0d41263ec709c386"),
    ("images", {"samples": 3, "seed": 2}, "90e5a10152355659"),
    ("labels", {"classes": ("a", "b"), "length": 8}, "036a79cd74d6fa58"),
    ("labels", {"classes": ("a", "b"), "length": 8, "samples": 3}, "a6c90ebff678cdf3"),
    ("labels", {"classes": ("a", "b"), "length": 8, "samples": 3, "seed": 2}, "08d7d7161b58c5a6"),
    ("pairs", {"length": 8}, "fda33eadcd19fbf5"),
    ("pairs", {"length": 8, "samples": 3}, "21039f7df2b4a788"),
    ("pairs", {"length": 8, "samples": 3, "seed": 2}, "ebc1e0ba526a5f74"),
    ("tensors", {}, "256569d730c7f06e"),
    ("tensors", {"samples": 3}, "f457c79cc74baff6"),
    ("tensors", {"samples": 3, "seed": 2}, "bf50fbf313603013"),
    ("text", {"length": 8}, "902150896ad690dd"),
    ("text", {"length": 8, "samples": 3}, "bedf9667ac291e41"),
    ("text", {"length": 8, "samples": 3, "seed": 2}, "f7a66444a646a9e1"),
    ("texts", {"length": 8}, "9eacceeb14642f9f"),
    ("texts", {"length": 8, "samples": 3}, "3031d8982000565d"),
    ("texts", {"length": 8, "samples": 3, "seed": 2}, "62d168b75c0de221"),
    ("tokens", {}, "a9487149a0f8ba17"),
    ("tokens", {"samples": 3}, "83f0f0da557da9e7"),
    ("tokens", {"samples": 3, "seed": 2}, "ad1cbde3e175b7d2"),
    ("text", {"length": 8, "skip": 2}, "79bd9358c92953a8"),
]


@pytest.mark.parametrize(("word", "params", "digest"), DIGESTS)
def test_the_identity_of_a_data_set_is_that_of_earlier_versions(tmp_path, word, params, digest):
    (tmp_path / "rows").write_bytes(b"the same bytes\n")
    settings, origin = SimpleNamespace(cache_dir=tmp_path / "cache"), SimpleNamespace(tokenizer_identity="t")
    ctx = SimpleNamespace(folder=tmp_path, settings=settings, origin=origin, seed=5)
    data = getattr(importlib.import_module(f"effc.compiler.inputs.data.{word}"), word.capitalize())
    assert data(path="rows", **params).identity(ctx).startswith(digest)
