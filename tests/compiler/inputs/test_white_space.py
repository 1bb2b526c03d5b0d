"""Line ends and blank files of `text`."""

import pytest
import torch
from effc.compiler.inputs.data.text import Text
from effc.compiler.inputs.sources.hf import Hf

from tests import worlds


@pytest.fixture
def ctx(tmp_path):
    worlds.tokenizer(worlds.llama(tmp_path / "model"))
    return worlds.context(tmp_path, Hf(name="./model").resolve(worlds.context(tmp_path)))


def rows(name: str, ctx) -> torch.Tensor:
    return torch.stack(list(Text(path=name, length=8).rows(ctx.tokenizer, ctx)))


def test_line_ends_of_other_systems_are_those_of_this_one(ctx):
    text = b"one line\nanother one\n\nthe last"
    for name, data in {"lf": text, "crlf": text.replace(b"\n", b"\r\n"), "cr": text.replace(b"\n", b"\r")}.items():
        (ctx.folder / f"{name}.txt").write_bytes(data)
    assert torch.equal(rows("crlf.txt", ctx), rows("lf.txt", ctx))
    assert torch.equal(rows("cr.txt", ctx), rows("lf.txt", ctx))


def test_a_file_of_white_space_is_refused(ctx):
    (ctx.folder / "blank.txt").write_text(" \n\n\t \n" * 40)
    (fault,) = worlds.refused(lambda: rows("blank.txt", ctx)).diagnostics
    assert fault.slug == "too-short" and "nothing but white space" in fault.message
