"""The weights that are loaded are those whose headers were checked and whose bytes were hashed and locked.

transformers knows several files that a folder's weights may lie in, and takes the first of its own order.
"""

import json
import shutil

import pytest
import torch
from effc.compiler.analysis.planning.lock import _model_files
from effc.compiler.artifacts.model_loading import load_stock_model
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.models.checkpoints.auxiliary_models import open_model_with_head
from safetensors.torch import load_file, save_file
from transformers import MODEL_MAPPING, AutoModelForCausalLM

from tests import worlds

torch.set_num_threads(1)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path):
    worlds.llama(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(single, tmp_path):
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / INDEX).is_file()
    return tmp_path / "sharded"


def foreign(folder) -> dict[str, torch.Tensor]:
    """Tensors of the same names and shapes, of numbers that the folder's own files don't have."""
    return {
        name: torch.full_like(t, 0.123) for file in folder.glob("*.safetensors") for name, t in load_file(file).items()
    }


def as_single(folder):
    save_file(foreign(folder), folder / SINGLE, metadata={"format": "pt"})


def as_shards(folder):
    tensors = foreign(folder)
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))


def as_distributed(folder):
    save_file(foreign(folder), folder / "shard-00001-model-00001-of-00001.safetensors", metadata={"format": "pt"})


def by_config(folder):
    save_file(foreign(folder), folder / "others.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "others.safetensors"}))


WAYS = {"one file": as_single, "shards": as_shards, "a distributed checkpoint": as_distributed, "the config": by_config}


def hashed(folder, **settings):
    """A resolved origin, and the tensors of the files that decide its identity."""
    origin = Hf(name=str(folder)).resolve(worlds.context(folder.parent, **settings))
    files = [path for path in origin.files.facts if path.suffix == ".safetensors"]
    assert {f for f in _model_files(folder, "m") if f.suffix == ".safetensors"} == set(files)
    return origin, {name: tensor for file in files for name, tensor in load_file(file).items()}


def holds(model, tensors) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_weights_that_are_loaded_are_those_that_were_hashed_and_locked(kind, way, request):
    folder = request.getfixturevalue(kind)
    WAYS[way](folder)
    origin, tensors = hashed(folder)
    assert holds(origin.load(), tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_weights_that_appear_after_hashing_are_not_loaded(kind, way, request):
    folder = request.getfixturevalue(kind)
    origin, tensors = hashed(folder)
    WAYS[way](folder)
    if (kind, way) == ("single", "one file"):
        with pytest.raises(Exception, match="model-changed"):
            origin.refuse_changed_files()  # the hashed file itself was written
    else:
        assert holds(origin.load(), tensors)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_brings_its_code_is_loaded_from_the_hashed_files_as_well(sharded, way):
    config = json.loads((sharded / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"]}
    config |= {"auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (sharded / "config.json").write_text(json.dumps(config))
    (sharded / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'mine'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    WAYS[way](sharded)
    origin, tensors = hashed(sharded, trust_remote_code=True)
    assert holds(origin.load(), tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "opening", [lambda f: load_stock_model(f, None), lambda f: open_model_with_head(f, MODEL_MAPPING, "m")]
)
def test_a_folder_of_an_artifact_is_loaded_from_the_files_whose_headers_were_checked(sharded, way, opening):
    WAYS[way](sharded)
    _, tensors = hashed(sharded)
    model = opening(sharded)
    names = {name.removeprefix("model.") if not hasattr(model, "model") else name: t for name, t in tensors.items()}
    names.pop("lm_head.weight", None)
    assert holds(model, names)


def test_a_class_that_reads_further_files_is_refused(single):
    """transformers' `extra_files` are weights that no index names."""
    from transformers import LlamaConfig

    origin, _ = hashed(single)
    LlamaConfig.extra_files = ("head.safetensors",)
    try:
        shutil.copy(single / SINGLE, single / "head.safetensors")
        with pytest.raises(Exception, match="other-weights"):
            origin.load()
    finally:
        del LlamaConfig.extra_files
