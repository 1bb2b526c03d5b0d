"""Arrays that a federation trains in a program, by their shapes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....dsl.checker.inputs import rank_too_large
from ...analysis.discovery.discover import skeleton_of
from ...ir.layers.linear import weight_of
from ...models.checkpoints.pretrained import pretrained
from .faults import incompatible_strategy
from .low_rank import lora_module_paths
from .state import Shapes

if TYPE_CHECKING:
    from ....dsl.checker.values import DataRef, Selector
    from ...ir.layers.reft import Intervention
    from ...ir.program import Program
    from ...plugin.context import Context
    from .sizes import SubNetwork


def trainable_state_shapes(
    program: "Program", trains: str, tokens: int, rank: int, selector: "Selector | None"
) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that `trains` names, without a head: `trains` as the target `flower` has it, adapters of
    this rank on modules."""
    from ...transforms.training.adapters import require_adaptable_modules
    from .slots import intervention_parameters

    if trains == "index":
        return {}
    if trains == "prompt":
        return {"prompt": (tokens, weight_of(pretrained(program.model).get_input_embeddings()).shape[1])}
    if trains == "full":
        return {name: tuple(p.shape) for name, p in program.model.named_parameters()}
    if trains == "reft":
        interventions_of = _interventions(program)
        return {
            name: tuple(p.shape)
            for path, f in interventions_of.items()
            for name, p in intervention_parameters(path, f).items()
        }
    parts = {part.path: part for part in skeleton_of(program).parts}
    full: dict[str, tuple[int, ...]] = {}
    for path in require_adaptable_modules(program, selector, "trains: full"):
        shape = dict(parts[path].tensors)["weight"]
        out, inputs = reversed(shape) if parts[path].kind == "Conv1D" else shape
        full |= {f"{path}.A": (rank, inputs), f"{path}.B": (out, rank)}
    return full


def refuse_ranks_above_widths(full_shapes: Shapes, rank: int, argument: str) -> None:
    """Reject (rank-too-large) adapters whose product needs no such rank: B A is at most as wide as a weight."""
    widths = {
        path: min(full_shapes[f"{path}.A"][1], full_shapes[f"{path}.B"][0]) for path in lora_module_paths(full_shapes)
    }
    path = min(widths, key=lambda p: widths[p], default="")
    if path and rank > widths[path]:
        raise rank_too_large(
            f"an adapter has rank {rank}, and the weight of `{path}` none above {widths[path]}",
            help=f"at most {widths[path]}; 4 to 32 are usual",
            argument=argument,
        ).rejection()


def _interventions(program: "Program") -> "dict[str, Intervention]":
    """Its interventions. Raises Reject (unfit-strategy) where it has none."""
    from .slots import interventions_by_path

    result = interventions_by_path(program.model)
    if not result:
        raise incompatible_strategy(
            f"`trains: reft`, and {type(program.model).__name__} has no interventions",
            help="put `reft.insert()` into the pipeline",
        ).rejection()
    return result


def refuse_incompatible_intervention_forms(program: "Program", is_personal: bool, way: str) -> None:
    """Reject a way of putting interventions together (rotations.py) that means nothing for their forms."""
    forms = {function.form for function in _interventions(program).values()}
    if is_personal and way != "project" and forms - {"loreft", "odireft"}:
        raise incompatible_strategy(
            f"`way: {way}` rotates R, W and b together, and interventions are {', '.join(sorted(forms))}",
            help="`way: project`, or `reft.insert(form: loreft)`",
        ).rejection()
    if is_personal and way == "function" and forms != {"loreft"}:
        raise incompatible_strategy(
            "`way: function` averages what `loreft` computes, and other forms compute something else",
            help="`way: align`",
        ).rejection()


def refuse_short_prompts(program: "Program", ctx: "Context", refs: "Sequence[DataRef]") -> None:
    """Reject interventions at more positions than any prompt of the data has."""
    from ...ir.layers.reft import interventions

    n_positions = max((module.first + module.last for _, module in interventions(program.model)), default=0)
    for ref in refs:
        lengths = ctx.prompts(ref)
        if lengths is not None and len(lengths) and int(lengths.max()) < n_positions:
            raise incompatible_strategy(
                f"interventions edit {n_positions} positions, and the longest prompt of `{ref.name}` has "
                f"{int(lengths.max())} tokens",
                help="insert interventions of fewer `positions`",
                argument="data",
            ).rejection()


def refuse_prompt_beyond_positions(prompt_tokens: int, row_length: int, max_positions: int | None) -> None:
    """Reject a soft prompt that leaves rows no room among a model's positions, where it says how many it has."""
    if max_positions is not None and prompt_tokens + row_length > max_positions:
        raise incompatible_strategy(
            f"{prompt_tokens} embeddings in front of rows of {row_length} tokens are "
            f"{prompt_tokens + row_length} positions, and the "
            f"model was made for {max_positions}",
            help=f"at most `tokens: {max_positions - row_length}`; 8 to 100 are usual"
            if max_positions > row_length
            else "cut rows shorter",
            argument="tokens",
        ).rejection()


def require_full_size(program: "Program", sizes: "Sequence[SubNetwork]") -> None:
    """Reject sizes of which none is the whole model: one client tells the others the weights to start from."""
    from ...analysis.planning.shrink import param_count

    full_size, largest = param_count(skeleton_of(program)), max((size.params for size in sizes), default=0)
    if sizes and largest < full_size:
        raise incompatible_strategy(
            f"the largest budget holds {largest:,} of {full_size:,} parameters, "
            "and one client tells the others the "
            "weights to start from",
            help="give one of them `100%`",
            argument="budgets",
        ).rejection()


def refuse_data_without_pairs(ctx: "Context", refs: "Sequence[DataRef]") -> None:
    """Reject data that are no texts with a partner each."""
    from ...inputs.data.texts import Texts

    for ref in refs:
        data = ctx.data(ref)
        if not isinstance(data, Texts) or len(data.fields) != 2:
            raise incompatible_strategy(
                f"an index is made of documents and questions, and `{ref.name}` has none",
                help='`texts`, with two fields: `fields: ["question", "answer"]`',
                argument="data",
            ).rejection()
