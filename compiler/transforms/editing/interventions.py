"""Interventions at the end of layers: found on the graph, put in as one call, and taken out again."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import fx

from ....dsl.checker.inputs import wide_rank_diagnostic
from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.nearest import nearest_name_help
from ...ir.layers.reft import FORMS, Reft, interventions, share_prompt_positions
from ...ir.program import Program
from .rewrite import Rewriter

NAME = "reft"

no_stream = Fault(
    "no-stream",
    "A layer gets an intervention and has no residual stream of one hidden state per position that it could edit.\n\n"
    "Interventions edit hidden states [batch, position, width] as a layer hands them on; images in a convolutional "
    "net have another form.",
)
twice_intervened = Fault("twice-intervened", "A layer that has interventions gets others.")


def hidden_widths_or_reject(program: Program, layer_paths: tuple[str, ...]) -> dict[str, int]:
    """The width of what each layer hands on. Raises Reject where one hands on no row of hidden states."""
    result = {}
    for path in layer_paths:
        node = residual_output_node(program.units[path].graph)
        if node is None:
            raise no_stream(
                f"{path} hands on no hidden states [batch, position, width]", help="leave it out of `on`"
            ).rejection()
        result[path] = node.meta["shape"][-1]
    return result


def residual_output_node(graph: fx.Graph) -> fx.Node | None:
    """Residual stream behind a unit: its first result of the shape of one of its inputs."""
    *_, output = graph.nodes
    shapes = [n.meta.get("shape") for n in graph.nodes if n.op == "placeholder"]
    return next((x for x in output.all_input_nodes if x.meta.get("shape") in shapes and _is_rows(x)), None)


def _is_rows(node: fx.Node) -> bool:
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    return isinstance(shape, (tuple, list)) and len(shape) == 3 and isinstance(dtype, str) and "float" in dtype


def insert_interventions(program: Program, intervention_by_unit: Mapping[str, Reft]) -> None:
    """Put interventions at the end of units; what is behind reads the edited stream, the unit itself the old one.

    intervention_by_unit  unit path -> its interventions
    Raises Reject (twice-intervened), with nothing changed, where a unit has some.
    """
    occupied = next((path for path in intervention_by_unit if NAME in program.model.get_submodule(path)._modules), None)
    if occupied is not None:
        raise twice_intervened(
            f"{occupied} has interventions already",
            help="insert them once, with the rank and the positions that you want",
        ).rejection()
    with Rewriter(program) as rewrite:
        for path, module in intervention_by_unit.items():
            graph = copy.deepcopy(program.units[path].graph)
            value, (*_, output) = residual_output_node(graph), graph.nodes
            assert value is not None, f"{path} has no stream"
            with graph.inserting_before(output):
                edited = graph.call_module(NAME, (value,))
            edited.meta = {key: value.meta[key] for key in ("shape", "dtype") if key in value.meta}
            edited.meta |= {"scope": (), "role": "intervention"}
            output.replace_input_with(value, edited)
            rewrite.add_module(f"{path}.{NAME}", module)
            rewrite.set_unit_graph(path, graph)
        share_prompt_positions(program.model)


def make_interventions(
    program: Program,
    layer_paths: tuple[str, ...],
    form: str,
    rank: int,
    first_last_counts: tuple[int, int],
    is_tied: bool,
    dropout: float,
    init_name: str,
    seed_of_layer: Callable[[str], int],
) -> dict[str, Reft]:
    """New interventions for layers, with their first values.

    first_last_counts  how many positions in front of and behind a prompt
    seed_of_layer      path -> seed of its first values
    Raises Reject (rank-too-large, no-stream).
    """
    result = {}
    for path, width in hidden_widths_or_reject(program, layer_paths).items():
        if rank > width:
            raise wide_rank_diagnostic(rank, width, f" of {path}").rejection()
        assert form in FORMS, nearest_name_help(form, FORMS, "there is")
        spec = {
            "form": form,
            "width": width,
            "rank": rank,
            "first": first_last_counts[0],
            "last": first_last_counts[1],
            "tied": is_tied,
            "dropout": dropout,
        }
        result[path] = Reft.from_spec(program.model.get_submodule(path), spec)
        generator = torch.Generator().manual_seed(seed_of_layer(path))
        for function in result[path].interventions():
            function.init_weights(init_name, generator)
        result[path].train(program.model.get_submodule(path).training)
    return result


def remove_interventions(program: Program) -> None:
    """Take all interventions out: the layers compute what they did before."""
    with Rewriter(program) as rewrite:
        for path, _ in list(interventions(program.model)):
            unit = path.rpartition(".")[0]
            graph = copy.deepcopy(program.units[unit].graph)
            for node in [n for n in graph.nodes if n.op == "call_module" and n.target == NAME]:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            rewrite.set_unit_graph(unit, graph)
            rewrite.take_module(path)
