"""Which config, if any, makes the stock model that a changed one is."""

from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.amount import Amount
from effc.compiler.analysis.planning.selection import groups
from effc.compiler.artifacts.stock import stock_config
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search.uniform_widths import narrow_evenly_and_report
from effc.dsl.checker.values import Ratio

from tests import tiny


def with_fewer_heads(share: float):
    """A Llama of 8 heads on 4 KV heads whose config states head_dim, with that share of its KV heads left."""
    program = capture(tiny.model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=16))
    narrow_evenly_and_report(
        program, groups(skeleton_of(program), "kv_heads", None), Amount(Ratio(share, "kv_heads")), 1
    )
    return program.model


def test_a_number_that_forward_reads_explains_no_shape():
    config, why = stock_config(with_fewer_heads(0.5))  # 8 heads half as wide would have the same shapes
    assert why == [] and config.head_dim == 16
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


def test_a_config_that_loading_refuses_is_no_stock_one():
    _, why = stock_config(with_fewer_heads(0.75))  # 64 is no multiple of 6 heads
    assert why
