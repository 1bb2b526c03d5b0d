"""Rules of the plan reader, in the order in which they are tried: a new one is a row here, and its file.

A rule that recognises a module by what it computes declines where it does not; so the cheap ones stand before.
"""

from torch import Tensor, nn

from . import (
    attention_lowering,
    calls,
    convolutions,
    eager_attention,
    elementwise,
    graph_values,
    indexers,
    key_score_bias,
    layer_rules,
    linear_attention,
    mixtures,
    norms,
    number_ops,
    recurrences,
    reductions,
    rotary_lowering,
    rwkv,
    scanning,
    tables,
    wrapped_rows,
)
from .rule import Rule, anything, function, module, operand, role
from .values import CachedRows, FirstTokenRows, Routed, Rows

VALUES = (  # no numbers of a target's tokens
    Rule(wrapped_rows.is_of_source, wrapped_rows.lower_source_value),
    Rule(graph_values.is_placeholder, graph_values.lower_placeholder),
    Rule(graph_values.is_attribute, graph_values.lower_attribute),
    Rule(role("mask"), graph_values.lower_mask),
    Rule(role("rotary_embedding", "cache_length"), graph_values.lower_positions),
    Rule(wrapped_rows.reads_source, wrapped_rows.lower_in_encoder),
    Rule(graph_values.is_positional, graph_values.lower_positional),
    Rule(graph_values.reads_cache, graph_values.reject_cache),
    Rule(graph_values.is_constant, graph_values.lower_constant),
)
ATTENTION = (
    Rule(role("cache_update"), attention_lowering.lower_cache_update),
    Rule(role("rotary"), rotary_lowering.lower_rotary),
    Rule(role("attention"), attention_lowering.lower_attention),
    Rule(operand(FirstTokenRows), wrapped_rows.lower_on_first_token),
)
REGIONS = (  # values between a router and a sum of experts, or between scores and what they weigh
    Rule(operand(Routed), mixtures.lower_after_router),
    Rule(key_score_bias.makes_key_score_bias, key_score_bias.lower_key_score_bias),
    Rule(eager_attention.mixes_tokens, eager_attention.lower_score_operation),
    Rule(operand(CachedRows), wrapped_rows.lower_cached),
)
MODULES = (
    Rule(role("dropout", "identity", "slice_logits", "padding"), number_ops.lower_identity),  # no sequence is padded
    Rule(role("ssm_conv"), convolutions.lower_convolution),
    Rule(scanning.is_delta_rule, scanning.lower_delta_rule),
    Rule(function("mamba2_chunk_scan"), scanning.lower_ssd),
    Rule(function("mamba_selective_scan"), scanning.lower_selective),
    Rule(role("ssm_scan"), scanning.reject_scan),
    Rule(role("embedding"), tables.lower_embedding),
    Rule(role("router", first=Rows), mixtures.lower_router),
    Rule(module(nn.Conv1d), convolutions.lower_if_depthwise_convolution),
    Rule(module(nn.ZeroPad2d), convolutions.lower_zero_pad),
    Rule(module(), recurrences.lower_recurrence),
    Rule(module(), rwkv.lower_rwkv),
    Rule(module(), linear_attention.lower_linear_attention),
    Rule(module(), mixtures.evaluate_if_renamed_router),
    Rule(module(), indexers.lower_choice_of_all_positions),
    Rule(role("norm", first=Rows), scanning.lower_gated_norm),
    Rule(layer_rules.is_layer_of_role("linear"), layer_rules.lower_linear),
    Rule(layer_rules.is_layer_of_role("norm"), norms.lower_norm),
    Rule(layer_rules.is_layer_of_role("activation"), elementwise.lower_activation),
    Rule(module(), layer_rules.reject_module),
)
FUNCTIONS = (
    Rule(function(*calls.SIZE_CALLS, first=Rows), number_ops.lower_size),
    Rule(function(*calls.SAME, first=Rows), number_ops.lower_identity),
    Rule(function("getitem", first=(tuple, list)), number_ops.lower_item),
    Rule(function("new_empty", "new_zeros", "zeros_like", first=Rows), number_ops.lower_zeros),
    Rule(function("copy_", first=Rows), number_ops.lower_copy),
    Rule(function(*number_ops.INPLACE, first=Rows), number_ops.lower_inplace),
    Rule(function("setitem", first=Rows), number_ops.lower_setitem),
    Rule(function(*calls.JOINS), number_ops.lower_concatenation),
    Rule(number_ops.picks_first_token, number_ops.lower_first_token),
    Rule(function(*calls.MOVES, first=Tensor), number_ops.lower_constant_view),
    Rule(function(*calls.MOVES, first=Rows), number_ops.lower_view_or_permutation),
    Rule(function("pad", first=Rows), convolutions.lower_zero_pad),
    Rule(function(*calls.UNARY, first=Rows), elementwise.lower_unary),
    Rule(function("where"), elementwise.lower_where),
    Rule(function(*reductions.KINDS, first=Rows), reductions.lower_reduction),
    Rule(function(*calls.BINARY), elementwise.lower_binary),
    Rule(function("linear"), number_ops.lower_functional_linear),
    Rule(eager_attention.is_score_product, eager_attention.lower_score_product),
    Rule(function("matmul", "bmm"), scanning.lower_constant_product),
    Rule(function("matmul", "bmm"), reductions.lower_matrix_product),
    Rule(function("softmax", "topk", first=Rows), mixtures.lower_function_of_logits),
    Rule(anything, number_ops.reject_function),
)
RULES = (*VALUES, *ATTENTION, *REGIONS, *MODULES, *FUNCTIONS)
