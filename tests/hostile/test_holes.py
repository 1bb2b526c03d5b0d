"""Files of holes: a terabyte that costs nothing to send, and hours to be hashed."""

import os
import time

import pytest
from effc.compiler.artifacts.manifest import Manifest, verify_files
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.models.checkpoints.safetensors_header import read_safetensors_header
from effc.dsl.syntax.diagnostics import Reject

from tests import worlds

TERABYTE = 1 << 40


def holes(path) -> None:
    path.touch()
    try:
        os.truncate(path, TERABYTE)
    except OSError:
        pytest.skip("no file system for files of a terabyte")


def test_a_terabyte_of_holes_in_an_artifact_is_not_hashed(tmp_path):
    holes(tmp_path / "weights.bin")
    started = time.process_time()
    with pytest.raises(Reject, match="odd-file"):
        verify_files(tmp_path, Manifest("hf", files={"weights.bin": (TERABYTE, "0" * 64)}))
    assert time.process_time() - started < 5


def test_weights_of_holes_are_refused_by_their_folder(tmp_path):
    folder = worlds.llama(tmp_path / "model")
    holes(folder / "model.safetensors")
    for reading in (
        lambda: read_safetensors_header(folder / "model.safetensors"),
        lambda: Hf(name=str(folder)).resolve(worlds.context(tmp_path)),
    ):
        with pytest.raises(Reject, match="odd-file"):
            reading()
