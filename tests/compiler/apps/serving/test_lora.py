"""LoRA that requests name, and adapters that come and go while a server answers."""

import json
import shutil
import threading
from pathlib import Path

import httpx
import openai
import pytest
import torch
from effc.compiler.apps.serving.adapters import (
    folder_by_adapter_of_option,
    model_copies_with_adapters,
    parse_adapter_options,
)
from effc.compiler.apps.serving.runner import CachedModel
from effc.compiler.artifacts.adapter import CONFIG, WEIGHTS
from effc.compiler.cli.verbs.model_sources import parse_model_arguments
from effc.compiler.core.settings import Settings
from effc.compiler.driver.models import open_model
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import save_file

from tests.compiler.apps.serving.conftest import serving
from tests.compiler.apps.serving.test_reload import reload, streamed

pytestmark = pytest.mark.slow

pytest.importorskip("peft")
ALPHA, RANK = 8, 4


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return open_model("zoo:tiny-llama", Settings(tmp_path_factory.mktemp("c")))


def write_lora(folder: Path, model, seed: int, **fields) -> Path:
    """A LoRA as peft writes it, of random numbers, on all projections of queries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: m.weight.shape for name, m in model.named_modules() if name.endswith("q_proj")}
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(config | fields))
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_a_lora_computes_what_its_merged_weights_do_over_the_tensors_of_the_base(opened, tmp_path):
    folder = write_lora(tmp_path / "law", opened.model, 0)
    adapted = model_copies_with_adapters(opened.model, "tiny", parse_adapter_options([f"law={folder}"]))["law"]
    assert {id(p) for p in opened.model.parameters()} <= {id(p) for p in adapted.parameters()}
    merged, ids = open_model("zoo:tiny-llama", Settings(tmp_path)).model, torch.arange(40)[None]
    plain = opened.model(ids).logits
    assert torch.equal(plain, merged(ids).logits)
    with torch.no_grad():
        for path, module in merged.named_modules():
            if path.endswith("q_proj"):
                down, up = (
                    getattr(adapted.get_submodule(path), side)["default"].weight for side in ("lora_A", "lora_B")
                )
                module.weight += ALPHA / RANK * up @ down
    expected = merged(ids).logits
    assert not torch.allclose(plain, expected, atol=0.1)
    torch.testing.assert_close(adapted(ids).logits, expected, atol=5e-3, rtol=1e-3)  # sums of another order, scaled up
    assert torch.equal(opened.model(ids).logits, plain)


def test_a_prompt_under_a_lora_may_come_in_pieces(opened, tmp_path):
    folder = write_lora(tmp_path / "law", opened.model, 0)
    models = model_copies_with_adapters(opened.model, "tiny", parse_adapter_options([f"law={folder}"]))
    runner, ids = CachedModel(opened.model, 2, models), list(range(40))
    assert not runner.needs_full_prompt("law")
    runner.set_sequence_adapter(0, "law")
    runner.run(ids[:17], [0] * 17, [])
    torch.testing.assert_close(
        runner.run(ids[17:], [0] * 23, [22])[0], models["law"](torch.tensor([ids])).logits[0, -1], atol=5e-3, rtol=1e-3
    )


def test_a_folder_of_adapters_names_each_by_its_folder(opened, tmp_path):
    for name in ("verse", "law"):
        write_lora(tmp_path / "all" / name, opened.model, 0)
    (tmp_path / "all" / ".hidden").mkdir()
    (tmp_path / "all" / "readme.txt").write_text("")
    everything = f"*={tmp_path / 'all'}"
    assert list(parse_adapter_options([everything])) == ["law", "verse"]
    assert list(folder_by_adapter_of_option(f"tiny:{everything}")) == ["law", "verse"]
    with pytest.raises(Reject, match="two adapters are called `law`"):
        parse_adapter_options([everything, f"law={tmp_path / 'all/law'}"])
    with pytest.raises(Reject, match=r"`tiny:law` may be an adapter's name, too"):
        parse_model_arguments(["tiny=zoo:tiny-llama", "tiny:law=zoo:tiny-llama"], adapters=[f"tiny:{everything}"])
    (tmp_path / "all" / "a b").mkdir()
    with pytest.raises(Reject, match="has no name for an adapter"):
        parse_adapter_options([everything])
    with pytest.raises(Reject, match="is no folder of adapters"):
        parse_adapter_options([f"*={tmp_path / 'nowhere'}"])


def complete(server, adapter: str) -> str:
    answer = server.client.completions.create(
        model=f"{server.name}:{adapter}", prompt="And it came to pass", max_tokens=12, temperature=0
    )
    return answer.choices[0].text


@pytest.mark.slow
def test_adapters_come_and_go_while_streams_run(opened, tmp_path):
    models = tmp_path / "models"
    law = write_lora(models / "law", opened.model, 0)
    with serving("zoo:tiny-llama", "--adapter", f"*={models}", "--reload") as server:
        texts, plain = {"law": complete(server, "law")}, streamed(server)
        assert texts["law"] != plain
        with pytest.raises(openai.NotFoundError, match="`tiny-llama:verse` does not exist"):
            complete(server, "verse")

        write_lora(models / "verse", opened.model, 1)
        stream = server.client.completions.create(
            model="tiny-llama:law", prompt="And it came to pass", max_tokens=200, temperature=0, stream=True
        )
        begin = next(iter(stream)).choices[0].text
        reload(server, "loaded")
        texts["verse"] = complete(server, "verse")
        assert len({plain, *texts.values()}) == 3 and complete(server, "law") == texts["law"]

        shutil.rmtree(law)  # while it answers
        reload(server, "loaded")
        rest = "".join(chunk.choices[0].text for chunk in stream)
        assert (begin + rest).startswith(texts["law"])
        with pytest.raises(openai.NotFoundError, match="`tiny-llama:verse` do"):
            complete(server, "law")

        write_lora(models / "bad", opened.model, 2, use_dora=True)
        before = streamed(server)
        reload(server, "refused")
        (line,) = [line for line in server.lines() if line.get("outcome") == "refused"]
        assert "bad/adapter_config.json" in line["reason"] and "`use_dora`" in line["reason"]
        assert streamed(server) == before and complete(server, "verse") == texts["verse"]


@pytest.mark.parametrize("name", ["../law", "tiny-llama:../law", "law/../verse", "", ":", "tiny-llama:", "law\n", "*"])
def test_a_request_picks_an_adapter_by_its_listed_name_alone(lora_server, name):
    answer = httpx.post(f"{lora_server.url}/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.fixture(scope="module")
def lora_server(opened, tmp_path_factory):
    folder = write_lora(tmp_path_factory.mktemp("lora") / "law", opened.model, 0)
    with serving("zoo:tiny-llama", "--adapter", f"law={folder}") as server:
        yield server


def resident_kib(server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.heavy
def test_a_hundred_loads_and_drops_under_requests_leave_no_memory_behind(opened, tmp_path):
    models, ended, failures = tmp_path / "models", threading.Event(), []
    write_lora(models / "stays", opened.model, 0)
    with serving("zoo:tiny-llama", "--adapter", f"*={models}", "--reload") as server:
        expected = complete(server, "stays")

        def ask_until_the_end() -> None:
            while not ended.is_set():
                if complete(server, "stays") != expected:
                    failures.append("another answer")

        asking = threading.Thread(target=ask_until_the_end)
        asking.start()
        sizes = []
        for round in range(50):
            folder = write_lora(models / f"a{round}", opened.model, round)
            reload(server, "loaded")
            assert complete(server, f"a{round}")
            shutil.rmtree(folder)
            reload(server, "loaded")
            sizes.append(resident_kib(server))
        ended.set()
        asking.join()
        assert not failures
        assert sizes[-1] - sizes[10] < 64 << 10, sizes  # KiB; a model of torch takes 20 MB
