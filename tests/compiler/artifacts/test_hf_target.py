"""Every form of a changed model computes, in a fresh process, what the model in memory computes."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from effc.compiler.analysis.discovery.bypass import other_operand_of_join
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts import openers, verify_child
from effc.compiler.artifacts.compat import plan_padding_to_stock
from effc.compiler.artifacts.output_comparison import compare_outputs
from effc.compiler.artifacts.stock import stock_config
from effc.compiler.artifacts.verify import attention_name_or_json
from effc.compiler.artifacts.verify_child import inputs_for_config, probe_model
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.program import Program
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.targets.hf import FORMS, Hf
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.dsl.checker.skeleton import Group
from effc.dsl.checker.values import Bytes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.grids import wide
from tests.recipes_in_memory import origin_of
from tests.worlds import context, refused

torch.set_num_threads(1)
COMPACT, MODEL, COMPAT = FORMS
BY_NAME = {form.folder: form for form in FORMS}
CHANGES = ("nothing", "layers", "widths", "uneven", "fewer and uneven")
WIDER = tuple(name for name in tiny.WIDER if name != "rwkv")
# Some architectures meet the change that makes every kind of shape, and two meet every change; `heavy` crosses all.
EVERY = ("llama", "gpt2")
CROSSED = [
    pytest.param(
        name, change, marks=() if name in EVERY or (change == "uneven" and name in tiny.STAND) else pytest.mark.heavy
    )
    for name, change in product(tiny.NAMES, CHANGES)
]


# -- changes -------------------------------------------------------------------------------------------------


def cut(program: Program, group: Group, items: list[int]) -> None:
    """Remove items of a group, as passes do."""
    with Rewriter(program) as rewrite:
        for member in group.members:
            size = program.model.get_parameter(member.tensor).shape[member.axis]
            dead = {index for item in items for index in member.indices(item)}
            rewrite.narrow(member.tensor, member.axis, [i for i in range(size) if i not in dead])
        for path, name, per in group.attributes:
            rewrite.set_attr(f"{path}.{name}", round(per * (group.count - len(items))))


def groups(program: Program, kind: str, layer: int) -> list[Group]:
    unit = skeleton_of(program).units[layer] + "."
    return [g for g in skeleton_of(program).groups if g.kind == kind and g.members[0].tensor.startswith(unit)]


def drop(program: Program, role: str, layer: int) -> None:
    unit = skeleton_of(program).units[layer]
    branch = next(b for b in skeleton_of(program).branches if b.role == role and b.unit == unit)
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(unit, branch.join, other_operand_of_join(program.units[unit].graph, branch))


def widths(program: Program) -> None:
    """Every MLP loses the same number of channels, scattered ones."""
    for layer in range(len(skeleton_of(program).units)):
        for group in groups(program, "channels", layer):
            cut(program, group, list(range(layer, group.count, 3)))


def uneven(program: Program) -> None:
    """Channels of one layer, heads of another, a KV head, the attention of the first and the MLP of the last."""
    for group in groups(program, "channels", 1):
        cut(program, group, [0, 3, 4, 90])
    for group in groups(program, "heads", 1):
        cut(program, group, [1, group.per_block] if group.per_block else [2])
    for group in groups(program, "kv_heads", 2):
        cut(program, group, [0])
    drop(program, "attention", 0)
    drop(program, "mlp", 2)


def layers(program: Program) -> None:
    with Rewriter(program) as rewrite:
        rewrite.drop_layer(skeleton_of(program).units[1])


def changed(name: str, change: str, **config) -> Program:
    program = capture(tiny.model(name, **config))
    if change == "one branch":
        drop(program, skeleton_of(program).branches[0].role, 0)
    elif change == "fewer and uneven":
        drop(program, "attention", 0)
        layers(program)
        drop(program, "mlp", 1)
    else:
        {"nothing": lambda p: None, "layers": layers, "widths": widths, "uneven": uneven}[change](program)
    return program


# -- every form, every architecture --------------------------------------------------------------------------


def emit(program: Program, folder: Path, origin: Origin | None = None, **options) -> Path:
    """`origin` is needed where edits changed the model's own config: where layers are gone."""
    folder.mkdir(parents=True)
    Hf(path="a", **options).emit(program, folder, context(folder.parent, origin or origin_of(program.model)))
    return folder


REOPEN = """
import runpy, sys, json
from safetensors.torch import load_file, save_file
child = runpy.run_path(sys.argv[1])
for opener, folder, attention in json.loads(sys.argv[2]):
    model = runpy.run_path(opener)["load"](folder, attention).eval()
    save_file(child["probe_model"](model, load_file(folder + "/../inputs.safetensors")), folder + ".out.safetensors")
"""


def reopen(jobs: list[tuple[str, Path, str]]) -> None:
    """One fresh process for many folders; `verify` itself takes one for each."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; torch.set_num_threads(1)\n" + REOPEN,
            verify_child.__file__,
            json.dumps(
                [
                    [str(Path(openers.__file__).with_name(f"{opens}.py")), str(folder), attention]
                    for opens, folder, attention in jobs
                ]
            ),
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def artifacts(request, tmp_path_factory):
    """(name, change) -> folder with all forms, what the model in memory computes, and what fresh ones do."""
    root, found, jobs = tmp_path_factory.mktemp("forms"), {}, []
    own = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.id for item in own if "artifacts" in item.fixturenames}
    for name, change in (*product(tiny.NAMES, CHANGES), *product(WIDER, ("one branch",))):
        if f"{name}-{change}" not in asked and (name not in asked or change not in ("uneven", "one branch")):
            continue
        program = changed(name, change)
        folder = emit(program, root / f"{name}-{change}", origin_of(tiny.blank(name)))
        inputs = inputs_for_config(program.model.config)
        save_file(inputs, folder / "inputs.safetensors")
        found[name, change] = folder, probe_model(program.model, inputs)
        jobs += [
            ("effc" if form == "compact" else "plain", folder / form, attention_name_or_json(program.model))
            for form in ("model", "compat", "compact")
            if (folder / form).is_dir()
        ]
    for how in ("plain", "effc"):  # the plain ones first: nothing of effc may be there yet
        reopen([job for job in jobs if job[0] == how])
    return found


@pytest.mark.parametrize(("name", "change"), CROSSED)
@pytest.mark.slow
def test_a_fresh_process_computes_the_same_from_every_form(artifacts, name, change):
    folder, expected = artifacts[name, change]
    forms = {p.name for p in folder.iterdir() if p.is_dir()}
    assert forms == ({"compact", "compat"} if "uneven" in change else {"model"})
    assert_same(folder, forms, expected)


@pytest.mark.parametrize("name", wide(WIDER, ("mixtral", "gemma4_text", "mamba2", "jamba", "bert")))
def test_a_lost_branch_is_lost_in_every_form(artifacts, name):
    """Parallel branches share a norm; state space layers still write their cache: neither may change a form."""
    folder, expected = artifacts[name, "one branch"]
    assert_same(folder, {"compact", "compat"}, expected)


def assert_same(folder: Path, forms: set[str], expected: dict[str, torch.Tensor]) -> None:
    for form in forms:
        for check in compare_outputs(
            BY_NAME[form], expected, load_file(folder / f"{form}.out.safetensors"), torch.float32
        ):
            assert check.holds, check
            assert form == "compat" or check.worst == 0.0, check


@pytest.mark.parametrize("name", wide(tiny.NAMES, tiny.STAND))
def test_compact_is_as_small_as_the_model(artifacts, name):
    folder, _ = artifacts[name, "uneven"]
    model = changed(name, "uneven").model
    size = sum(p.numel() * 4 for p in model.parameters()) + sum(
        b.numel() * b.itemsize for n, b in model.named_buffers() if n in model.state_dict()
    )
    assert size <= (folder / "compact" / "model.safetensors").stat().st_size < size + 20_000  # and a header


def test_uniformly_fewer_heads_are_a_config(tmp_path):
    program = capture(tiny.model("llama"))
    for layer in range(3):
        (group,) = groups(program, "heads", layer)
        cut(program, group, [1, 2])
    config, why = stock_config(program.model)
    assert why == [] and (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 16)


def test_uniform_widths_are_a_config(tmp_path):
    config, why = stock_config(changed("llama", "widths").model)
    assert why == [] and config.intermediate_size == 64
    assert stock_config(changed("gpt2", "widths").model)[0].n_inner == 64


# -- reasons -------------------------------------------------------------------------------------------------


def test_stock_asked_for_by_name_is_refused_with_the_first_odd_shape(tmp_path):
    (found,) = refused(lambda: emit(changed("llama", "uneven"), tmp_path / "a", form="stock")).diagnostics
    assert found.slug == "cannot-write-form" and "LlamaForCausalLM" in found.message


def test_a_norm_over_cut_heads_can_not_be_filled_up(tmp_path):
    facts = {**tiny._GATED, "num_key_value_heads": 4}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **facts), dtype=torch.float32).eval()
    program = capture(made)
    with Rewriter(program) as rewrite:
        site = "model.layers.1.self_attn"
        for part in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            rewrite.narrow(f"{site}.{part}.weight", 0, range(48))
        rewrite.narrow(f"{site}.o_proj.weight", 1, range(48))
    folder = emit(program, tmp_path / "a")
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["compact"]
    assert "can't be filled up to 64 x 64: a norm" in (folder / "notes.json").read_text()
    (found,) = refused(lambda: emit(program, tmp_path / "b", form="compat")).diagnostics
    assert found.slug == "cannot-write-form" and "a norm" in found.message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [
        ("llama", "intermediate_size", 1),
        ("phi3", "intermediate_size", 1),
        ("gpt2", "n_inner", 4),
        ("opt", "ffn_dim", 4),
    ],
)
def test_compat_is_no_wider_than_its_widest_layer(tmp_path, name, width, heads):
    program = capture(tiny.model(name))
    for layer in range(3):
        for group in groups(program, "channels", layer):
            cut(program, group, list(range(4 * (layer + 2))))
        for group in groups(program, "kv_heads", layer):
            cut(program, group, [layer % 2])
    drop(program, "mlp", 2)
    folder = emit(program, tmp_path / "a", origin_of(tiny.blank(name)), form="compat")
    made = AutoModelForCausalLM.from_pretrained(folder / "compat").eval()
    assert getattr(made.config, width) == 88
    if heads == 1:
        assert (made.config.num_key_value_heads, made.config.num_attention_heads) == (1, 2)
    inputs = inputs_for_config(made.config)
    assert all(
        check.holds
        for check in compare_outputs(
            COMPAT, probe_model(program.model, inputs), probe_model(made, inputs), torch.float32
        )
    )
    assert program.model.num_parameters() < made.num_parameters() < tiny.model(name).num_parameters()


@pytest.mark.slow
def test_a_lost_branch_that_hands_on_a_state_can_not_be_filled_up_with_zeros(tmp_path):
    folder = emit(changed("rwkv", "one branch"), tmp_path / "a")
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["compact"]
    assert "rwkv.blocks.0.attention still runs" in (folder / "notes.json").read_text()


def test_a_width_outside_all_groups_can_not_be_filled_up():
    program = capture(tiny.model("llama"))
    with Rewriter(program) as rewrite:
        rewrite.narrow("lm_head.weight", 0, range(120))
    assert "lm_head.weight is 120 x 64, which can't be filled up to 128 x 64" in plan_padding_to_stock(program).reasons


# -- what a folder holds -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_large_weights_go_into_shards_and_tied_ones_once(tmp_path):
    program = changed("gpt2", "uneven")
    folder = emit(program, tmp_path / "a", shard=Bytes(60_000))
    for form in ("compact", "compat"):
        files = sorted((folder / form).glob("*.safetensors"))
        index = json.loads((folder / form / "model.safetensors.index.json").read_text())
        assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
        stored = [name for f in files for name in safe_open(f, "pt").keys()]  # noqa: SIM118
        assert len(stored) == len(set(stored)) and "lm_head.weight" not in stored
    made = AutoModelForCausalLM.from_pretrained(folder / "compat").eval()
    inputs = inputs_for_config(made.config)
    assert all(
        check.holds
        for check in compare_outputs(
            COMPAT, probe_model(program.model, inputs), probe_model(made, inputs), torch.float32
        )
    )


@pytest.mark.slow
def test_half_precision_keeps_its_type_and_its_logits(tmp_path):
    program = changed("llama", "uneven")
    program.model.to(torch.bfloat16)
    folder = emit(program, tmp_path / "a")
    for form in ("compact", "compat"):
        stored = load_file(folder / form / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    made = AutoModelForCausalLM.from_pretrained(folder / "compat").eval()
    assert made.dtype == torch.bfloat16
    inputs = inputs_for_config(made.config)
    assert all(
        check.holds
        for check in compare_outputs(
            COMPAT, probe_model(program.model, inputs), probe_model(made, inputs), torch.bfloat16
        )
    )


@pytest.mark.slow
def test_tokenizer_and_generation_config_come_along_byte_for_byte(tmp_path):
    from effc.compiler.models.checkpoints.model_folder import origin_of_folder

    ctx = context(tmp_path)
    ctx.origin = origin_of_folder(zoo_folders_by_name()["tiny-llama"], "zoo", "auto", ctx.settings)
    program = capture(ctx.origin.load())
    drop(program, "mlp", 1)
    Hf(path="a").emit(program, tmp_path, ctx)
    for form in ("compact", "compat"):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / form / name).read_bytes() == (ctx.origin.folder / name).read_bytes()
        text = "Once upon a time"
        ids = AutoTokenizer.from_pretrained(tmp_path / form)(text)["input_ids"]
        assert ids == ctx.tokenizer(text)["input_ids"]


@pytest.mark.slow
def test_the_same_program_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        emit(changed("llama", "uneven"), tmp_path / name)
    files = [f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*") if f.is_file()]
    assert len(files) > 5
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
