"""The harness's figures of an artifact are those of its own model `hf` for the original."""

import json
import sys
from pathlib import Path

import pytest
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.core.settings import Settings
from effc.compiler.driver.models import resolve_origin
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.targets.gguf import Gguf
from effc.compiler.targets.hf import Hf
from effc.compiler.targets.native import Native
from effc.compiler.targets.onnx import Onnx
from effc.compiler.targets.pt2 import Pt2
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.serving.conftest import serving
from tests.drafts import write_artifact
from tests.worlds import context

pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "effc[eval]"')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (zoo_folders_by_name()["tiny-llama"] / "model.safetensors").is_file(), reason="tiny-llama is not there"
    ),
]

FLOAT32 = 1e-4  # share of a figure: sums in another order
BFLOAT16 = 1e-2  # share of a figure: weights, keys and values are rounded to 2**-9, the model has 8 layers
TARGETS = {
    "hf": (Hf(path="hf", form="compact"), FLOAT32),
    "native": (Native(path="native"), BFLOAT16),
    "onnx": (Onnx(path="onnx"), FLOAT32),
    "gguf": (Gguf(path="gguf", type="f32"), FLOAT32),
    "pt2": (Pt2(path="pt2", context=256), FLOAT32),
}
TASKS = {
    "effc_choice": ("multiple_choice", 'doc_to_choice: "{{o}}"\ndoc_to_target: a', ["acc", "acc_norm"]),
    "effc_next": ("loglikelihood", 'doc_to_target: " {{n}}"', ["perplexity", "acc"]),
    "effc_text": ("loglikelihood_rolling", 'doc_to_target: "{{q}} {{n}}"', ["word_perplexity", "bits_per_byte"]),
    "effc_write": (
        "generate_until",
        'doc_to_target: "{{n}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}',
        ["exact_match"],
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks over words of the model's held-out text."""
    folder = tmp_path_factory.mktemp("tasks")
    words = (zoo_folders_by_name()["tiny-llama"] / "heldout.txt").read_text().split()
    records = [
        {"q": " ".join(words[i : i + 12]), "n": words[i + 12], "o": [words[i + 12], words[i + 40]], "a": 0}
        for i in range(0, 4 * 60, 60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, (kind, body, metrics) in TASKS.items():
        question = "" if kind == "loglikelihood_rolling" else "{{q}}"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
            f'test_split: test\noutput_type: {kind}\ndoc_to_text: "{question}"\n{body}\n'
            f"metric_list: [{', '.join(f'{{metric: {metric}}}' for metric in metrics)}]\n"
        )
    return folder


def scores(model: str, model_args: dict, tasks: Path, names=tuple(TASKS)) -> tuple[dict, dict]:
    """Figures of each task, and responses of the model to each record."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    result = simple_evaluate(
        model, model_args, tasks=list(names), task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0
    )
    figures = {
        (task, name): value
        for task in names
        for name, value in result["results"][task].items()
        if isinstance(value, float) and not name.endswith("stderr,none")
    }
    ordered = {t: sorted(result["samples"][t], key=lambda sample: sample["doc_id"]) for t in names}
    return figures, {t: [sample["resps"] for sample in ordered[t]] for t in names}


@pytest.fixture(scope="module")
def upstream(tasks):
    import effc.compiler.apps.lm_eval.model  # noqa: F401 (registers `effc`)

    folder = str(zoo_folders_by_name()["tiny-llama"])
    return scores("hf", {"pretrained": folder, "dtype": "float32", "device": "cpu"}, tasks)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    """A folder with an artifact of each target, less the verification."""
    work = tmp_path_factory.mktemp("artifacts")
    origin = resolve_origin(str(zoo_folders_by_name()["tiny-llama"]), Settings(cache_dir=work / "cache"))
    program, ctx = capture(origin.load().eval()), context(work, origin)
    for name, (target, _) in TARGETS.items():

        def build(folder: Path, name=name, target=target) -> Manifest:
            target.emit(program, folder, ctx)
            return Manifest(name)

        write_artifact(work / name, build=build)
    return work


@pytest.mark.parametrize("name", TARGETS)
def test_figures_of_an_artifact_are_those_of_the_harness_for_the_original(artifacts, tasks, upstream, name):
    figures, responses = scores("effc", {"pretrained": str(artifacts / name), "batch_size": 3}, tasks)
    expected, expected_responses = upstream
    assert len(expected) == 7 and figures == pytest.approx(expected, rel=TARGETS[name][1])
    assert responses["effc_write"] == expected_responses["effc_write"]


def test_a_server_is_scored_alike_through_the_client_of_the_harness(tasks, upstream):
    pytest.importorskip("tenacity")
    folder = zoo_folders_by_name()["tiny-llama"]
    with serving(folder) as server:
        args = {"base_url": f"{server.url}/v1/completions", "model": server.name, "tokenizer": str(folder)}
        args |= {"tokenizer_backend": "huggingface", "add_bos_token": True, "num_concurrent": 1, "max_retries": 1}
        figures, responses = scores("local-completions", args, tasks)
    expected, expected_responses = upstream
    assert figures == pytest.approx(expected, rel=FLOAT32)
    assert responses["effc_write"] == expected_responses["effc_write"]


@pytest.fixture
def harness(monkeypatch, capsys, tasks):
    """`harness(words)` is the command line in this process: its exit code, stdout and stderr."""
    from effc.compiler.apps.lm_eval.__main__ import main

    def run(pretrained: str) -> tuple[int, str, str]:
        words = ["--model", "effc", "--model_args", f"pretrained={pretrained}", "--tasks", "effc_choice"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--include_path", str(tasks)])
        return main(), *capsys.readouterr()

    return run


def test_the_command_line_of_the_harness_knows_the_model(harness):
    code, out, _ = harness("zoo:tiny-llama")
    assert code == 0 and "acc_norm" in out


def test_an_artifact_that_can_not_be_opened_is_a_diagnostic_of_the_command_line(harness):
    code, _, err = harness("nowhere")
    assert code == 2 and "error[unknown-place]: there is no `nowhere`" in err and "Traceback" not in err


def test_without_the_harness_the_command_line_names_the_extra(harness, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = harness("zoo:tiny-llama")
    assert code == 5 and 'pip install "effc[eval]"' in err


def test_an_artifact_that_nobody_signed_is_not_opened_where_a_signature_is_required(artifacts, tmp_path):
    from effc.compiler.apps.lm_eval.model import ArtifactLM

    key = tmp_path / "key.pub"
    key.write_text("ed25519:" + "A" * 43 + "=\n")
    with pytest.raises(Reject) as rejection:
        ArtifactLM(str(artifacts / "native"), signed_by=str(key))
    assert [d.slug for d in rejection.value.diagnostics] == ["unsigned-artifact"]


def test_an_engine_of_the_cpu_stays_there_whatever_device_the_harness_names(artifacts):
    from effc.compiler.apps.lm_eval.model import usable_device

    devices = {name: usable_device(str(artifacts / name), "mps") for name in ("native", "onnx", "gguf", "hf")}
    assert devices == {"native": "cpu", "onnx": "cpu", "gguf": "cpu", "hf": "mps"}
