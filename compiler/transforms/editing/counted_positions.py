"""Tables of positions, which a decoder reads by the number of tokens that its cache holds."""

from torch import nn
from transformers import PreTrainedModel

from ...ir import surgery
from ...ir.graphs import uses_self_attention_cache
from ...ir.program import Program
from ...models.checkpoints.origin import POSITIONS


def loses_position_counter(program: Program, edited_program: Program, unit_path: str) -> bool:
    """Whether a unit's stack, which has a table of positions, loses its last cached attention in `edited_program`.

    What is cached says where the next token stands; nothing is behind an attention over what an encoder gave.
    """
    stack = surgery.split_parent_and_name(unit_path)[0]
    before, after = (
        any(
            uses_self_attention_cache(unit.graph)
            for unit in of.units.values()
            if surgery.split_parent_and_name(unit.path)[0] == stack
        )
        for of in (program, edited_program)
    )
    return before and not after and _has_position_table(program, unit_path)


def _has_position_table(program: Program, unit_path: str) -> bool:
    """Whether a tensor outside of the units has a row for each position that the config of a unit's stack states."""
    config = _innermost_config(program.model, unit_path)
    positions = next((size for name in POSITIONS if isinstance(size := getattr(config, name, None), int)), None)
    if positions is None:
        return False
    words, inside = _word_embeddings(program.model), tuple(f"{unit}." for unit in program.units)
    rows = {
        len(table)
        for name, module in program.model.named_modules()
        if not isinstance(module, nn.Linear) and module not in words and not f"{name}.".startswith(inside)
        for table in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if table.dim() == 2
    }
    return not rows.isdisjoint(range(positions, positions + 3))  # OPT and BART begin behind two rows


def _word_embeddings(model: nn.Module) -> set[nn.Module]:
    """Tables of tokens, of a model and of models inside of it."""
    tables: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            try:
                tables.add(part.get_input_embeddings())
            except NotImplementedError:  # reads no tokens
                continue
    return tables


def _innermost_config(model: nn.Module, unit_path: str) -> object:
    """The config of the innermost module around a unit that has one."""
    while unit_path:
        unit_path = surgery.split_parent_and_name(unit_path)[0]
        if (config := vars(model.get_submodule(unit_path)).get("config")) is not None:
            return config
    return getattr(model, "config", None)
