"""Stored graphs: what is written is read back the same, and nothing else is ever read."""

import copy
import json
import operator

import pytest
import torch
from effc.compiler.ir import graph_json, operations
from effc.compiler.ir.capture.capture import capture, full_model_unit
from effc.compiler.ir.unit import graph_code_hash
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from tests import tiny

torch.set_num_threads(1)


def stored(graph):
    return json.loads(json.dumps(graph_json.graph_to_json(graph)))


_PROGRAMS = {name: capture(tiny.model(name)) for name in ("llama", "phi3", "opt", "gpt2")}
_SAMPLES = [stored(next(iter(p.units.values())).graph) for p in _PROGRAMS.values()]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_graph_comes_back_equal_in_code_and_notes(name):
    program = capture(tiny.model(name))
    for unit in (full_model_unit(program), *program.units.values()):
        again = graph_json.graph_from_json(stored(unit.graph))
        assert graph_code_hash(again) == unit.key
        assert [node.meta for node in again.nodes] == [node.meta for node in unit.graph.nodes]
        assert stored(again) == stored(unit.graph)


def test_every_listed_operation_exists():
    for prefix, listed, owner in operations._TABLES:
        for name in listed:
            assert operations.allowlisted_function(f"{prefix}.{name}") is getattr(owner, name)
    methods = {name for name in operations._METHOD if name not in dir(torch.Tensor)}
    assert methods == {
        "get_seq_length",
        "get_mask_sizes",
        "get_query_offset",
        "has_previous_state",
        "get_max_cache_shape",
        "update_conv_state",
        "update_recurrent_state",
        "get_conv_state",
        "get_recurrent_state",
    }


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_WORDS = (
    "torch.load",
    "operator.attrgetter",
    "builtins.eval",
    "getattr",
    "leaf.rotary",
    "call_function",
    "get_attr",
    "__class__",
    "os.system",
    "output",
    "node",
    "tuple",
    "self",
    "inf",
    "lambda",
    "x;import os",
    "transformers.models.llama.modeling_llama.LlamaForCausalLM",
    "transformers.masking_utils.create_causal_mask",
)


def _places(tree, path=()):
    yield path
    if isinstance(tree, dict):
        for key in tree:
            yield from _places(tree[key], (*path, key))
    elif isinstance(tree, list):
        for i in range(len(tree)):
            yield from _places(tree[i], (*path, i))


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@settings(max_examples=400, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_a_damaged_graph_is_read_or_refused_and_nothing_else_happens(data):
    tree = copy.deepcopy(data.draw(st.sampled_from(_SAMPLES)))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(_places(tree))[1:] or [()]))
        if not path:
            break
        owner, key = _at(tree, path[:-1]), path[-1]
        what = data.draw(st.sampled_from(["put", "word", "remove", "copy"]))
        if what == "put":
            owner[key] = data.draw(_json)
        elif what == "word":
            owner[key] = data.draw(st.sampled_from(_WORDS))
        elif what == "copy":
            owner[key] = copy.deepcopy(_at(tree, data.draw(st.sampled_from(list(_places(tree))))))
        else:
            del owner[key]
    try:
        graph = graph_json.graph_from_json(tree)
    except Reject as refused:
        assert refused.diagnostics[0].slug == "refused-graph"
        return
    graph_code_hash(graph)  # what is read can be written as code
    for node in graph.nodes:  # and calls what is listed
        if node.op == "call_function":
            operations.name_of_allowlisted_function(node.target)
        elif node.op == "call_method":
            operations.checked_method_name(node.target)


def test_a_getattr_of_what_is_no_name_is_refused():
    x = {"op": "placeholder", "name": "x", "target": "x"}
    for name in (
        {"slice": [None, 64, None]},
        {"tuple": [{"ellipsis": True}, {"slice": [None, 64, None]}]},
        {"list": []},
    ):
        read = {"op": "call_function", "name": "y", "target": "getattr", "args": [{"node": "x"}, name]}
        with pytest.raises(Reject):
            graph_json.graph_from_json({"format": 1, "nodes": [x, read]})


@settings(max_examples=200, deadline=None)
@given(_json)
def test_any_json_that_is_no_graph_is_refused(tree):
    with pytest.raises(Reject):
        graph_json.graph_from_json(tree)


def _graph(*calls, output="x"):
    x = {"op": "placeholder", "name": "x", "target": "x", "args": [None]}
    end = {"op": "output", "name": "output", "target": "output", "args": [{"node": output}]}
    return {"format": 1, "nodes": [x, *calls, end]}


def _call(op, target, *args, name="y", **kwargs):
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


X = {"node": "x"}


@pytest.mark.parametrize(
    "call",
    [
        _call("call_function", "builtins.eval", "1"),
        _call("call_function", "torch.load", "/etc/passwd"),
        _call("call_function", "torch.ops.effc.anything", X),
        _call("call_function", "operator.attrgetter", "a"),
        _call("call_function", "operator.methodcaller", "a"),
        _call("call_function", "getattr", X, "__class__"),
        _call("call_function", "getattr", X, "grad_fn"),
        _call("call_function", "getattr", X, X),
        _call("call_function", "getattr", X, "shape", X),
        _call("call_function", "transformers.modeling_utils.load_state_dict", X),
        _call("call_function", "transformers.models.llama.modeling_llama.os", X),
        _call("call_function", "transformers.models.no_such.modeling_no_such.apply_rotary_pos_emb", X),
        _call("call_method", "__reduce__", X),
        _call("call_method", "apply_", X),
        _call("call_method", "register_hook", X),
        _call("call_method", "view", "text"),
        _call("call_module", "mlp.__class__", X),
        _call("call_module", "mlp; import os", X),
        _call("call_module", "mlp..x", X),
        _call("get_attr", "__dict__"),
        _call("get_attr", "a" * 500),
        _call("get_attr", "mlp", X),
        _call("call_function", "torch.cos", {"node": "z"}),
        _call("call_function", "torch.cos", {"node": "y"}),
        _call("call_function", "torch.cos", X, name="x"),
        _call("call_function", "torch.cos", X, name="self"),
        _call("call_function", "torch.cos", X, name="not a name"),
        _call("call_function", "torch.cos", X, name="lambda"),
        _call("call_function", "torch.cos", X, name="__import__"),
        _call("call_function", "torch.cos", X, name="torch"),
        _call("call_function", "torch.cos", X, **{"a b": 1}),
        _call("call_function", "torch.cos", {"code": "1"}),
        _call("call_function", "torch.cos", {"dtype": "save"}),
        _call("call_function", "torch.cos", {"device": "cpu:0; x"}),
        _call("call_function", "torch.cos", {"slice": [1]}),
        _call("call_function", "torch.cos", 2**70),
        _call("call_function", "torch.cos", "t" * 2000),
        _call("placeholder", "y", X),
        _call("placeholder", "y", 3),
        _call("output", "output", X),
    ],
    ids=lambda call: f"{call['op']} {str(call['target'])[:30]} {str(call['args'])[:30]} {call['name']}"[:80],
)
def test_what_is_not_listed_is_refused_with_a_diagnostic(call):
    with pytest.raises(Reject) as refused:
        graph_json.graph_from_json(_graph(call))
    assert refused.value.diagnostics[0].message.startswith("a stored graph holds ")


def _calls(*calls):
    """A graph of these calls of operators; a number below 0 stands for the result of so many calls before."""
    nodes = [
        {"op": "placeholder", "name": "x", "target": "x"},
        {"op": "call_method", "name": "n", "target": "numel", "args": [{"node": "x"}]},
        {"op": "call_method", "name": "s", "target": "size", "args": [{"node": "x"}]},
        {"op": "call_function", "name": "real", "target": "getattr", "args": [{"node": "n"}, "real"]},
        {"op": "call_method", "name": "one", "target": "size", "args": [{"node": "x"}, 1]},
        {"op": "call_method", "name": "k", "target": "topk", "args": [{"node": "x"}, 2]},
        {"op": "call_method", "name": "m", "target": "max", "args": [{"node": "x"}]},
    ]
    for i, (name, *args) in enumerate(calls):
        nodes.append({"op": "call_function", "name": f"c{i}", "target": f"operator.{name}", "args": args})
    return {"format": 1, "nodes": [*nodes, {"op": "output", "name": "output", "args": [{"node": nodes[-1]["name"]}]}]}


@pytest.mark.parametrize(
    "calls",
    [
        [("pow", 10, 10**9)],
        [("pow", 10, {"node": "n"})],
        [("pow", {"node": "n"}, 10**8)],
        [("pow", 7, 10**5), *[("mul", {"node": f"c{i}"}, {"node": f"c{i}"}) for i in range(20)]],
        [("mul", {"node": "n"}, {"node": "n"}), *[("mul", {"node": f"c{i}"}, {"node": f"c{i}"}) for i in range(30)]],
        [("mul", {"node": "s"}, 2**30)],
        [("mul", 2**30, {"node": "s"})],
        [("mul", {"node": "s"}, {"node": "n"})],
        [("mul", {"list": [0] * 10}, 2**38)],
        [("add", {"node": "s"}, {"node": "s"}), *[("add", {"node": f"c{i}"}, {"node": f"c{i}"}) for i in range(30)]],
        [("getitem", {"node": "s"}, 0), ("pow", 3, {"node": "c0"})],
        [("mul", {"node": "k"}, {"node": "n"})],
        [
            ("mul", {"node": "one"}, {"node": "one"}),
            *[("mul", {"node": f"c{i}"}, {"node": f"c{i}"}) for i in range(30)],
        ],
        [("lshift", 1, 2**33)],
        [("lshift", {"node": "n"}, {"node": "n"})],
        [
            ("mul", {"node": "real"}, {"node": "real"}),
            *[("mul", {"node": f"c{i}"}, {"node": f"c{i}"}) for i in range(30)],
        ],
        [("mul", "a", 2**40)],
        [("mod", "%2000000000d", 5)],
    ],
)
def test_numbers_and_tuples_without_end_are_refused_before_they_are_computed(calls):
    with pytest.raises(Reject, match=r"without end|arithmetic of a text"):
        graph_json.graph_from_json(_calls(*calls))


def test_arithmetic_of_shapes_and_tensors_is_read():
    shape = ("getitem", {"node": "s"}, {"slice": [None, -1, None]})
    heads = ("add", {"node": "c0"}, {"tuple": [4, 16]})
    graph_json.graph_from_json(_calls(shape, heads, ("pow", 10000.0, {"node": "n"}), ("pow", {"node": "x"}, 3)))
    graph_json.graph_from_json(
        _calls(("truediv", {"node": "n"}, 2), ("pow", 10000, {"node": "c0"}), ("mul", {"node": "x"}, -(2**40)))
    )


def test_arguments_nested_without_end_are_refused():
    deep = X
    for _ in range(5000):
        deep = {"list": [deep]}
    with pytest.raises(Reject):
        graph_json.graph_from_json(_graph(_call("call_function", "torch.stack", deep)))


@pytest.mark.parametrize(
    "argument",
    [
        None,
        True,
        3,
        -1.5,
        float("inf"),
        float("-inf"),
        "text",
        (1, [2, (3,)], {"a": None}),
        slice(None, 3, None),
        ...,
        torch.float16,
        torch.device("cpu"),
    ],
    ids=str,
)
def test_every_kind_of_argument_survives(argument):
    graph = fx.Graph()
    x = graph.placeholder("x", default_value=None)
    y = graph.call_function(operator.getitem, (x, argument), {})
    graph.output((x, y))
    again = graph_json.graph_from_json(stored(graph))
    assert list(again.nodes)[1].args[1] == argument
    assert graph_code_hash(again) == graph_code_hash(graph)


def test_what_cannot_be_read_again_is_not_written():
    graph = fx.Graph()
    graph.output(graph.call_function(torch.load, (graph.placeholder("x"),)))
    with pytest.raises(Reject, match=r"torch.*load"):
        graph_json.graph_to_json(graph)
