"""Channels of the residual stream go from all layers at once; what is left is narrowed by hand here, without effc."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.discovery.streams import skeleton_with_stream, stream_group_or_refusal
from effc.compiler.analysis.planning.shrink import param_count
from effc.compiler.analysis.planning.stream_width import remaining_width, with_stream_width
from effc.compiler.artifacts.stock import stock_config
from effc.compiler.driver import api
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.gguf.shapes import gguf_shape_of, shape_metadata
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.widths import slice_group
from effc.dsl.checker.values import DataRef, Ratio
from effc.dsl.syntax.diagnostics import Reject
from effc.passes.prune.hidden import Hidden
from torch import nn
from transformers import LlamaForCausalLM

from tests import tiny, worlds
from tests.architectures import table
from tests.architectures.matrix import body, run
from tests.grids import wide
from tests.recipes_in_memory import context_of, recipe_of

torch.set_num_threads(1)
IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
NAMES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt2",
    "phi3",
    "bert",
    "t5",
    "bart",
    "mixtral",
    "qwen3_next",
    "vit",
    "mamba",
    "mamba2",
    "jamba",
    "granitemoehybrid",
)
STOCK = {"llama", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_next", "vit", "mamba"}
NARROWER = "computes with|is .* by the config"


def model_of(name: str) -> nn.Module:
    return tiny.model(name) if name in (*tiny.NAMES, *tiny.WIDER) else table.model(name)


def dead_channels(count: int, share: float = 0.25) -> set[int]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    return set(order[: int(count * share)].tolist())


class OverSome(nn.Module):
    """A norm whose mean runs over some channels; it gives zero for the others."""

    def __init__(self, norm: nn.Module, channels: list[int]):
        super().__init__()
        self.norm, self.channels, self.weight = copy.deepcopy(norm), channels, norm.weight
        for name, parameter in list(self.norm.named_parameters()):
            setattr(self.norm, name, nn.Parameter(parameter.detach()[channels]))
        if isinstance(norm, nn.LayerNorm):
            self.norm.normalized_shape = (len(channels),)

    def forward(self, x):
        out = torch.zeros_like(x)
        out[..., self.channels] = self.norm(x[..., self.channels])
        return out


def with_masked_norms(model: nn.Module, width: int, channels: list[int]) -> nn.Module:
    """The model as its stream would be without the other channels: all that reads it stands behind a norm."""
    for path, module in list(model.named_modules()):
        if "Norm" in type(module).__name__ and all(p.shape == (width,) for p in module.parameters()):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, OverSome(module, channels))
    return model


@pytest.mark.parametrize("name", wide(NAMES, {"llama", "gpt2", "t5", "mixtral", "mamba"}))
def test_a_narrower_stream_computes_what_norms_over_the_channels_that_stay_give(name):
    model = model_of(name)
    program = capture(copy.deepcopy(model))
    stream = stream_group_or_refusal(program)
    dead = dead_channels(stream.count)
    kept = [i for i in range(stream.count) if i not in dead]
    forecast = with_stream_width(skeleton_with_stream(program), len(kept))
    expected = equivalence.record_logits_of_sample_calls(with_masked_norms(model, stream.count, kept))
    with Rewriter(program) as rewrite:
        slice_group(program, rewrite, stream, dead)
    actual = equivalence.record_logits_of_sample_calls(program.model)
    largest = max(float(x.abs().max()) for x in expected)
    assert equivalence.max_difference(expected, actual) <= 1e-5 * largest, "sums in another order"
    assert skeleton_of(program).shapes() == forecast.shapes()
    assert stream_group_or_refusal(program) == forecast.stream


@pytest.mark.parametrize("name", wide(NAMES, {"llama", "gemma2", "gpt2"}))
def test_a_narrower_stream_has_a_stock_config_where_that_says_how_wide_heads_are(name):
    program = capture(model_of(name))
    stream = stream_group_or_refusal(program)
    with Rewriter(program) as rewrite:
        slice_group(program, rewrite, stream, dead_channels(stream.count))
    config, reasons = stock_config(program.model)
    assert (name in STOCK) is (not reasons), reasons[:3]
    if not reasons:
        assert config.hidden_size == 48


def narrowed_llama(model: LlamaForCausalLM, kept: list[int]) -> LlamaForCausalLM:
    """A llama of another config that has the weights of some channels, tensor by tensor."""
    config = copy.deepcopy(model.config)
    config.head_dim, config.hidden_size = model.model.layers[0].self_attn.head_dim, len(kept)
    narrow = LlamaForCausalLM(config).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 or "o_proj" in name or "down_proj" in name:
            state[name] = tensor[kept]
        else:
            state[name] = tensor[:, kept]
    narrow.load_state_dict(state)
    return narrow


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def hidden(tmp_path, model, **arguments):
    tmp_path.mkdir(exist_ok=True)
    program = capture(copy.deepcopy(model))
    Hidden(**{"keep": Ratio(0.75, "width"), "align": 16, **arguments}).run(
        program, context_of(tmp_path, model, recipe_of([]))
    )
    return program


@pytest.mark.parametrize("order", ["l1", "norms", "wanda"])
@pytest.mark.parametrize("tied", [False, True])
def test_without_repair_a_llama_is_the_one_that_is_narrowed_by_hand(tmp_path, order, tied):
    model = tiny.model("llama", tie_word_embeddings=tied)
    program = hidden(tmp_path, model, data=DataRef("rows"), reorder=order, repair=False)
    (note,) = [n for n in program.notes if n.get("kind") == "width"]
    kept = [i for i in range(64) if i not in set(note["removed"])]
    assert len(kept) == 48
    assert torch.allclose(logits(program.model), logits(narrowed_llama(model, kept)), atol=1e-5)


def test_norms_order_is_that_of_minitron(tmp_path):
    """Of each norm the mean magnitude over a row's tokens, the root of the squares over rows, summed over norms."""
    model = tiny.model("llama")
    ctx, outputs = context_of(tmp_path, model, recipe_of([])), []
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with torch.no_grad():
        model(ctx.rows(DataRef("rows")))
    scores = sum(x.abs().mean(1).square().sum(0).sqrt() for x in outputs)
    program = hidden(tmp_path, tiny.model("llama"), data=DataRef("rows"), reorder="norms", repair=False)
    (note,) = [n for n in program.notes if n.get("kind") == "width"]
    assert note["removed"] == sorted(scores.argsort()[:16].tolist())


def test_channels_that_no_reader_reads_go_first_and_refitting_changes_nothing_then(tmp_path):
    model = tiny.model("llama", tie_word_embeddings=False)
    unread = sorted(dead_channels(64))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            parameter.data[:, unread] = 0
    model.lm_head.weight.data[:, unread] = 0
    refitted = hidden(tmp_path / "a", model, data=DataRef("rows"))
    kept = [i for i in range(64) if i not in set(unread)]
    assert torch.allclose(logits(refitted.model), logits(narrowed_llama(model, kept)), atol=1e-4)  # least squares


def test_refitted_readers_are_nearer_to_the_original(tmp_path):
    model = tiny.model("llama")
    rows = context_of(tmp_path, model, recipe_of([])).rows(DataRef("rows"))

    def divergence(program):
        with torch.no_grad():
            original, other = (m(rows).logits.log_softmax(-1) for m in (model, program.model))
        return (original.exp() * (original - other)).sum(-1).mean().item()

    plain, refitted = (hidden(tmp_path / str(r), model, data=DataRef("rows"), repair=r) for r in (False, True))
    assert divergence(refitted) < divergence(plain)


def test_gguf_states_the_width_that_is_left(tmp_path):
    model = hidden(tmp_path, tiny.model("llama")).model
    assert shape_metadata(model, gguf_shape_of(model))["embedding_length"] == 48


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "embeddings are multiplied by the root of 64"),
        ("qwen2", "takes them for the 48 of the residual stream"),
    ],
)
def test_gguf_refuses_what_llama_cpp_would_compute_otherwise(tmp_path, name, reason):
    model = hidden(tmp_path, tiny.model(name)).model
    with pytest.raises(Reject, match=reason):
        gguf_shape_of(model)


@pytest.mark.parametrize(
    ("name", "step", "reason"),
    [
        ("qwen2", "prune.hidden(keep: 75% of width, align: 16)", "takes them for the 48 of the residual stream"),
        ("qwen2", "prune.heads(keep: 50% of heads)", "all heads of a layer have 32 numbers together"),
        ("gemma2", "prune.hidden(keep: 75% of width, align: 16)", "embeddings are multiplied by the root of 64"),
        ("llama", "prune.hidden(keep: 75% of width, align: 16)", ""),
        ("qwen2", "prune.channels(keep: 50% of channels, align: 16)", ""),
    ],
)
def test_gguf_refuses_such_widths_in_a_plan(tmp_path, name, step, reason):
    tiny.model(name, vocab_size=worlds.VOCABULARY).save_pretrained(tmp_path / name)
    worlds.tokenizer(tmp_path / name)
    recipe = tmp_path / "r.effspec"
    recipe.write_text(
        f'effspec 1\nmodel base = hf("./{name}")\npipeline slim(base) {{ thin = {step} }}\nemit slim {{\n'
        '  gguf("out", type: f16)\n}\n'
    )
    session = api.open_session(recipe, cache_dir=tmp_path / "cache")
    if not reason:
        assert api.plan_all_pipelines(session)
        return
    with pytest.raises(Reject, match=reason) as rejected:
        api.plan_all_pipelines(session)
    (diagnostic,) = rejected.value.diagnostics
    assert diagnostic.fault.slug == "cannot-write-gguf" and diagnostic.span.line == 5


def test_a_share_of_the_parameters_is_met_in_steps(tmp_path):
    model = tiny.model("llama")
    total = sum(p.numel() for p in model.parameters())
    program = hidden(tmp_path, model, keep=Ratio(0.8, "params"), align=8)
    left = sum(p.numel() for p in program.model.parameters())
    assert program.model.model.norm.weight.shape == (48,) and left <= 0.8 * total


def test_after_layers_and_channels_have_gone_the_forecast_is_still_exact(tmp_path):
    model = tiny.model("llama")
    recipe = recipe_of(
        [
            ("a", "prune.blocks", {"remove": 1, "unit": "layer"}),
            ("b", "prune.channels", {"keep": Ratio(0.5, "channels"), "align": 16}),
        ]
    )
    ctx = context_of(tmp_path, model, recipe)
    program = capture(model)
    skeleton = skeleton_with_stream(program)
    for step in recipe.pipelines["lean"].steps:
        pass_ = ctx.registry.make("pass", step.call)
        skeleton = pass_.forecast(skeleton)
        pass_.run(program, ctx)
    last = Hidden(keep=Ratio(0.5, "width"), align=8)
    skeleton = last.forecast(skeleton)
    last.run(program, ctx)
    assert sum(map(_size, skeleton.shapes().values())) == sum(p.numel() for p in program.model.parameters())


def _size(shape):
    return torch.Size(shape).numel()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet", "not all layers share one"),  # each stage has a width of its own
        ("whisper", "not all layers share one"),  # encoder and decoder are coupled by attention alone
        ("rwkv", "does something unknown with its channels"),
        ("albert", "no channels are handed from layer to layer"),
    ],
)
def test_streams_that_can_not_go_are_refused_with_a_reason(tmp_path, name, reason):
    skeleton = skeleton_with_stream(capture(model_of(name)))
    assert reason in skeleton.facts["fixed_stream"]
    with pytest.raises(Reject, match=reason):
        Hidden(keep=Ratio(0.5, "width")).forecast(skeleton)


@pytest.mark.slow
def test_narrower_streams_are_written_and_reopened_the_same(tmp_path):
    # MobileBERT joins two matrices, ConvBERT's stream is read by convolutions, MiniCPM3's config derives a factor
    names = ["llama", "gpt2", "gemma2", "bert", "t5", "mixtral", "vit", "mamba", "jamba"]
    names += ["mobilebert", "convbert", "minicpm3"]
    rows = body(run(names, {name: ["prune.hidden"] for name in names}, tmp_path))["rows"]
    cells = {name: {stage: cell[0] for stage, cell in row.items() if "hidden" in stage} for name, row in rows.items()}
    stages = ("prune.hidden prune", "prune.hidden emit", "prune.hidden reload")
    assert cells == {name: dict.fromkeys(stages, "green") for name in names}, rows


def test_a_head_that_joins_two_matrices_leaves_a_model_its_stream():
    assert not isinstance(stream_group_or_refusal(capture(table.model("mobilebert"))), str)


def test_a_model_that_returns_its_stream_keeps_it():
    from transformers import LlamaModel

    skeleton = skeleton_with_stream(capture(tiny.randomize(LlamaModel(tiny.config("llama")).eval())))
    with pytest.raises(Reject, match="the model returns it"):
        Hidden(keep=Ratio(0.5, "width")).forecast(skeleton)


def test_a_share_that_leaves_no_step_is_refused():
    with pytest.raises(Reject, match="a stream of 64 channels keeps"):
        Hidden(keep=Ratio(0.01, "params")).forecast(skeleton_with_stream(capture(tiny.model("llama", hidden_size=128))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("keep: 100% of width", "changes nothing"),
        ("keep: 99% of width, align: 64", "less than one step of `align: 64` below all 128 channels"),
        ("keep: 1% of width", "less than one step of `align: 64`"),
        ("keep: 50% of width, align: 256", "`align: 256` is more than the 128 channels of `model.layers`"),
        ("keep: 50% of channels", "of"),
        ("keep: 50% of width, repair: false", "`repair`"),
        ("keep: 50% of width, reorder: norms", "no `data` names rows"),
    ],
)
def test_amounts_and_orders_that_mean_nothing_are_refused_where_they_stand(tmp_path, call, message):
    text = f'effspec 1\nmodel base = zoo("tiny-llama")\npipeline slim(base) {{\n  thin = prune.hidden({call})\n}}\n'
    recipe = tmp_path / "r.effspec"
    recipe.write_text(text + 'emit slim { hf("out") }\n')
    diagnostics = api.open_session(recipe, cache_dir=tmp_path / "cache").check().diagnostics
    assert any(message in d.message and d.span and d.span.line == 4 for d in diagnostics), diagnostics


@pytest.mark.parametrize("of", ["width", "params"])
@pytest.mark.parametrize("align", [1, 8, 16])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.75])
def test_the_widest_stream_that_is_at_most_a_share_is_kept(of, align, share):
    skeleton = skeleton_with_stream(capture(tiny.model("llama")))

    def size(width):
        return width if of == "width" else param_count(with_stream_width(skeleton, width))

    expected = max(n for n in range(align, 65, align) if size(n) <= share * size(64))
    if size(64) - size(expected) <= 1.5 * (1 - share) * size(64):
        assert remaining_width(skeleton, Ratio(share, of), align) == expected
    else:
        with pytest.raises(Reject, match="overshoots"):
            remaining_width(skeleton, Ratio(share, of), align)


@pytest.mark.parametrize(
    ("keep", "align", "message", "help"),
    [
        (Ratio(0.89, "params"), 64, "leaves 64 of 128 channels, 50", "write `align: 16`, or `keep: 50"),
        (Ratio(0.8, "width"), 64, "leaves 64 of 128 channels, 50.0% of width", "write `align: 32`, or `keep: 50%"),
        (Ratio(0.999, "width"), 1, "leaves 127 of 128 channels", "write `keep: 99.3% of width`"),
        (
            Ratio(0.0001, "params"),
            1,
            "0.01% of params` is less than one step, and a stream of 1 channel ke",
            "at least",
        ),
    ],
)
def test_a_step_that_takes_far_more_than_the_share_is_refused_with_what_would_do(keep, align, message, help):
    skeleton = skeleton_with_stream(capture(tiny.model("llama", hidden_size=128)))
    with pytest.raises(Reject) as rejected:
        Hidden(keep=keep, align=align).forecast(skeleton)
    (diagnostic,) = rejected.value.diagnostics
    assert message in diagnostic.message and help in diagnostic.help and diagnostic.argument == "keep", diagnostic


def test_a_share_of_the_parameters_that_no_width_meets_is_refused_in_plan(tmp_path):
    recipe = tmp_path / "r.effspec"
    recipe.write_text(
        'effspec 1\nmodel base = zoo("tiny-llama")\npipeline slim(base) { thin = prune.hidden(keep: 20% of params) }\n'
        'emit slim { hf("out") }\n'
    )
    with pytest.raises(Reject, match="a stream of 64 channels keeps 5"):
        api.plan_all_pipelines(api.open_session(recipe, cache_dir=tmp_path / "cache"))
