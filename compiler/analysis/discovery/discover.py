"""From captured graphs to a `Skeleton`: what a model is made of, found without names of any architecture."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

from torch import fx, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ....dsl.checker.skeleton import Branch, Group, Part, Skeleton
from ...ir.capture.capture import full_model_unit
from ...ir.capture.patches import patch_module_calls
from ...ir.layers.linear import KernelLinear
from ...ir.program import Program
from .coupling import find_unit_groups
from .dependent_integers import Baked, attribute_changes_per_item
from .experts import EXPERTS_FIXED, expert_groups, with_width_multiple
from .image_positions import parts_with_image_positions
from .labels import label_graph
from .mixers.state_space import find_state_spaces
from .residual import find_branch_terms
from .sharing import join_shared_groups


@dataclass(frozen=True)
class Structure:
    """Structure of one unit; paths are relative to it. `leaving`: channels of its own go into other units."""

    branches: tuple[Branch, ...]
    groups: tuple[Group, ...]
    rejected: tuple[tuple[str, str], ...]
    leaving: bool = False


def skeleton_of(program: Program) -> Skeleton:
    """Shapes and discovered structure of a program as it is now, computed once per version of it."""
    return program.analysis(discover)


@patch_module_calls()
def discover(program: Program) -> Skeleton:
    """The skeleton of a captured model. Reads shapes and attributes only, so the meta device will do."""
    model = program.model
    tied = tuple(names_of_tied_parameters(model))
    unit_structures = list(structures_by_unit(program))
    branches = [_branch_with_full_paths(b, path) for path, structure in unit_structures for b in structure.branches]
    if any(structure.leaving for path, structure in unit_structures if path):
        # Channels couple across layers, as where a convolutional net changes its width: one look at all of it.
        unit_structures = [("", discover_structure(full_model_unit(program).graph, model))]
    refusals = [
        [join_paths(path, site), reason]
        for path, structure in unit_structures
        for site, reason in _first_refusal_per_child(structure.rejected, covers_full_model=not path)
    ]
    unit_groups = [
        group.renamed(partial(join_paths, path)) for path, structure in unit_structures for group in structure.groups
    ]
    groups = []
    for one in join_shared_groups(unit_groups, program, tied):
        groups += [one] if isinstance(one, Group) else []
        refusals += [] if isinstance(one, Group) else [list(one)]
    groups = [with_width_multiple(group, model) for group in groups_with_distinct_sites(groups)]
    mixers = find_state_spaces(program)
    several = {name for same in tied for name in same}
    groups += [group for group in mixers.groups if not any(m.tensor in several for m in group.members)]
    refusals = [entry for entry in refusals if entry[0] not in mixers.mixers] + [
        list(entry) for entry in mixers.rejected
    ]
    return Skeleton(
        model_type=_model_type(model),
        parts=tuple(parts_with_image_positions(parameter_parts(model), program)),
        units=tuple(program.units),
        branches=tuple(branches),
        groups=tuple(groups),
        tied=tied,
        opaque=tuple(program.opaque.items()),
        scans=mixers.scans,
        facts={**model_facts(model, program), "refused": refusals},
    )


def structures_by_unit(program: Program) -> Iterator[tuple[str, Structure]]:
    """The structure of every unit; equal layers are looked at once."""
    known: dict[Any, Structure] = {}
    for path, unit in program.units.items():
        root = program.model.get_submodule(path)
        shapes = tuple((name, tuple(p.shape)) for name, p in root.named_parameters(remove_duplicate=False))
        key = (unit.key, shapes)
        if key not in known:
            known[key] = discover_structure(unit.graph, root)
        yield path, known[key]


def discover_structure(graph: fx.Graph, root: nn.Module) -> Structure:
    """Branches and groups of one unit, or of a whole model as one graph."""
    stream = residual_stream_input(graph)
    entries = [stream] if stream else [n for n in graph.nodes if n.op == "placeholder" and _is_tensor(n)]
    labelling = label_graph(graph, root, stream.name if stream else None)
    branches = tuple(
        branches_with_distinct_sites(
            Branch(term.site, "", term.role, term.modules, term.join.name, term.value.name)
            for term in find_branch_terms(graph, root, entries, labelling.values)
        )
    )
    groups: list[Group] = []
    refusals: list[tuple[str, str]] = []
    result = find_unit_groups(labelling)
    for group, items in zip(result.groups, result.items, strict=True):
        try:
            attributes = attribute_changes_per_item(group, items, labelling, labelling.component_roots(), root)
            groups.append(replace(group, attributes=attributes))
        except Baked as error:
            refusals.append((group.site, str(error)))
    for experts in expert_groups(graph, root, labelling):
        if isinstance(experts, Group):
            groups.append(experts)
        else:
            refusals.append(experts)
    return Structure(branches, tuple(groups), (*result.rejected, *refusals), result.leaving)


def branches_with_distinct_sites(branches: Iterable[Branch]) -> Iterator[Branch]:
    """Branches with sites of their own: where several lie in the same module, the first that only one of them runs."""
    branches = list(branches)
    shared = Counter(b.site for b in branches)
    for branch in branches:
        unshared = [part for part in branch.parts if part not in shared]
        yield replace(branch, site=unshared[0]) if shared[branch.site] > 1 and unshared else branch


def _first_refusal_per_child(refusals: Iterable[tuple[str, str]], covers_full_model: bool) -> Iterator[tuple[str, str]]:
    """Yield the first refusal of each child of the unit, and of its experts; what follows from it isn't news. Of a
    whole model, per site."""
    sites = set()
    for site, reason in refusals:
        child = site if covers_full_model or reason.startswith(EXPERTS_FIXED) else site.split(".")[0]
        if child not in sites:
            sites.add(child)
            yield site, reason


def groups_with_distinct_sites(groups: Iterable[Group]) -> Iterator[Group]:
    """Groups with sites of their own: where several lie in the same module, the module that makes or reads them, and
    of heads the attention around it."""
    groups = list(groups)
    shared = Counter((g.site, g.kind) for g in groups)
    used = {key for key, count in shared.items() if count == 1}
    for group in groups:
        if shared[group.site, group.kind] == 1:
            yield group
            continue
        owners = [m.tensor.rpartition(".")[0] for m in (*group.members, group.members[0])]
        owners = [*(o.rpartition(".")[0] for o in owners if group.kind != "channels"), *owners]
        site = next((s for s in owners if (s, group.kind) not in used), group.site)
        used.add((site, group.kind))
        yield replace(group, site=site)


def residual_stream_input(graph: fx.Graph) -> fx.Node | None:
    """The placeholder that carries the residual stream: the first one of the shape of the unit's result."""
    *_, output = graph.nodes
    results = [x.meta.get("shape") for x in output.all_input_nodes]
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.meta.get("shape") in results]
    return inputs[0] if inputs and inputs[0].meta.get("shape") is not None else None


def _is_tensor(node: fx.Node) -> bool:
    shape = node.meta.get("shape")
    return shape is not None and all(isinstance(n, int) for n in shape)


def parameter_parts(model: nn.Module) -> Iterator[Part]:
    for path, module in model.named_modules():
        if isinstance(module, KernelLinear):  # as large as before: what packing saves is told in bytes
            shape, bias = (module.out_features, module.in_features), module.bias
            yield Part(path, "KernelLinear", (("weight", shape), *([] if bias is None else [("bias", shape[:1])])))
            continue
        tensors = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
        if tensors:
            yield Part(path, type(module).__name__, tensors)


def names_of_tied_parameters(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names that are one parameter, in order of registration."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return (tuple(same) for same in names.values() if len(same) > 1)


def model_facts(model: nn.Module, program: Program) -> dict[str, Any]:
    """Facts of a model at a glance; None where a model has no such thing."""
    config = model.config.get_text_config() if _is_pretrained(model) else None
    first = next(iter(program.units.values()), None)
    stream = residual_stream_input(first.graph) if first else None
    calls = [n for n in first.graph.nodes if n.meta.get("role") == "attention"] if first else []
    heads = getattr(config, "num_attention_heads", None)
    return {
        "hidden": stream.meta["shape"][-1] if stream else None,
        "layers": len(program.units),
        "vocab": _vocabulary_size(model),
        "positions": getattr(config, "max_position_embeddings", None),
        "layer_class": _single_value({type(model.get_submodule(path)).__name__ for path in program.units}),
        "active_experts": getattr(config, "num_experts_per_tok", None),
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", heads),
        "head_dim": calls[0].args[1].meta["shape"][-1] if calls else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "causal_lm": type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    }


def _vocabulary_size(model: nn.Module) -> int | None:
    """Number of token ids that are embedded; None for models that read none."""
    try:
        embedding = model.get_input_embeddings() if _is_pretrained(model) else None
    except NotImplementedError:  # convolutional nets embed nothing
        return None
    return embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None


def _single_value(values: set[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def join_paths(path: str, inner: str) -> str:
    return ".".join(x for x in (path, inner) if x)


def _branch_with_full_paths(branch: Branch, path: str) -> Branch:
    parts = tuple(join_paths(path, part) for part in branch.parts)
    return replace(branch, unit=path, site=join_paths(path, branch.site), parts=parts)


def _is_pretrained(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    return isinstance(model, PreTrainedModel)


def _model_type(model: nn.Module) -> str:
    return model.config.model_type if _is_pretrained(model) else type(model).__name__
