"""A kernel called past torch's dispatcher gives what the op gives, and only where nobody is to see the op."""

import pytest
import torch
from effc.kernels.kernel import is_unobserved_cpu_call
from effc.kernels.ops import KERNELS
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.layers import LINEAR, run, weight

LAYER = KERNELS["sparse_linear"]


@pytest.fixture(scope="module")
def packed():
    return LAYER.pack(weight(24, 40, 0.5))


@pytest.fixture
def body(monkeypatch):
    """The shapes of x with which the body was called at once; the op has it from its registration."""
    seen, native = [], LAYER.native
    monkeypatch.setattr(LAYER, "native", lambda *args: seen.append(tuple(args[0].shape)) or native(*args))
    return seen


def x(*shape) -> torch.Tensor:
    return torch.randn(*shape or (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", LINEAR)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_every_mode_it_gives_what_the_op_gives(kernel, mode):
    own, bias = KERNELS[kernel].pack(weight(24, 40, 0.5)), torch.ones(24)
    with mode():
        for rows in (x(2, 40), x(3, 2, 40), x(40), x(0, 40), x(40, 3).T, x(3, 80)[:, ::2], x(4, 3, 40)[:, -1]):
            assert torch.equal(KERNELS[kernel].call_op_or_kernel(rows, own, bias, 24), run(kernel, rows, own, bias, 24))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_body_is_called_at_once(packed, body, mode):
    with mode():
        LAYER.call_op_or_kernel(x(), packed, None, 24)
    assert body == [(2, 40)]


def test_where_gradients_are_recorded_they_reach_x(packed, body):
    rows = x().requires_grad_()
    LAYER.call_op_or_kernel(rows, packed, None, 24).sum().backward()
    assert torch.allclose(rows.grad, LAYER.unpack(packed).sum(0).expand(2, 40)) and not body


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@torch.no_grad()
def test_a_trace_shows_the_op(packed, body):
    graph = make_fx(lambda rows: LAYER.call_op_or_kernel(rows, packed, None, 24))(x()).graph
    assert torch.ops.effc.sparse_linear.default in {node.target for node in graph.nodes} and not body
    traced = torch.jit.trace(lambda rows: LAYER.call_op_or_kernel(rows, packed, None, 24), x(), check_trace=False)
    assert "effc::sparse_linear" in str(traced.graph) and not body


@torch.no_grad()
def test_a_mode_a_transform_and_a_profiler_see_the_op(packed, body):
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert LAYER.call_op_or_kernel(fake.from_tensor(x()), packed, None, 24).shape == (2, 24)
    by_row = torch.func.functionalize(lambda rows: LAYER.call_op_or_kernel(rows, packed, None, 24))(x())
    assert torch.equal(by_row, run("sparse_linear", x(), packed, None, 24))
    with torch.profiler.profile() as profile:
        LAYER.call_op_or_kernel(x(), packed, None, 24)
    assert "effc::sparse_linear" in {event.name for event in profile.events()} and not body


@torch.no_grad()
def test_a_compiled_function_keeps_the_op(packed, body):
    def layer(rows):
        return LAYER.call_op_or_kernel(rows, packed, None, 24)

    found = torch.compile(layer, backend="eager", fullgraph=True)(x())
    assert torch.equal(found, run("sparse_linear", x(), packed, None, 24)) and not body


@torch.no_grad()
def test_a_tensor_elsewhere_or_of_another_class_is_observed():
    class Own(torch.Tensor):
        pass

    assert (
        is_unobserved_cpu_call(x())
        and not is_unobserved_cpu_call(x().to("meta"))
        and not is_unobserved_cpu_call(x().as_subclass(Own))
    )
