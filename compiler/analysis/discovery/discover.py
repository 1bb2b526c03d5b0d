"""From captured graphs to a `Skeleton`: what a model is made of, found without names of any architecture."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch import fx, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ....dsl.checker.skeleton import Branch, Group, Part, Skeleton
from ...ir.capture.capture import flat
from ...ir.capture.patches import module_calls
from ...ir.layers.linear import KernelLinear
from ...ir.program import Program
from .coupling import groups_of
from .dependent_integers import Baked, attributes_of
from .experts import WHOLE, expert_groups, in_multiples
from .labels import label
from .mixers.state_space import state_space
from .residual import terms
from .sharing import joined


@dataclass(frozen=True)
class Structure:
    """What one unit holds, paths below it. `leaving`: channels of its own go into other units."""

    branches: tuple[Branch, ...]
    groups: tuple[Group, ...]
    refused: tuple[tuple[str, str], ...]
    leaving: bool = False


def skeleton_of(program: Program) -> Skeleton:
    """Shapes and discovered structure of a program as it is now, computed once per version of it."""
    return program.analysis(discover)


@module_calls()
def discover(program: Program) -> Skeleton:
    """The skeleton of a captured model. Reads shapes and attributes only, so the meta device will do."""
    model = program.model
    tied = tuple(tied_tensors(model))
    found = list(structures(program))
    branches = [_placed_branch(b, path) for path, structure in found for b in structure.branches]
    if any(structure.leaving for path, structure in found if path):
        # Channels couple across layers, as where a convolutional net changes its width: one look at all of it.
        found = [("", structure_of(flat(program).graph, model))]
    refused = [
        [join(path, site), why] for path, structure in found for site, why in _once(structure.refused, whole=not path)
    ]
    placed = [_placed_group(group, path) for path, structure in found for group in structure.groups]
    groups = []
    for one in joined(placed, program, tied):
        groups += [one] if isinstance(one, Group) else []
        refused += [] if isinstance(one, Group) else [list(one)]
    groups = [in_multiples(group, model) for group in told_apart(groups)]
    mixers = state_space(program)
    several = {name for same in tied for name in same}
    groups += [group for group in mixers.groups if not any(m.tensor in several for m in group.members)]
    refused = [entry for entry in refused if entry[0] not in mixers.mixers] + [list(entry) for entry in mixers.refused]
    return Skeleton(
        model_type=_model_type(model),
        parts=tuple(parts_of(model)),
        units=tuple(program.units),
        branches=tuple(branches),
        groups=tuple(groups),
        tied=tied,
        opaque=tuple(program.opaque.items()),
        scans=mixers.scans,
        facts={**facts_of(model, program), "refused": refused},
    )


def structures(program: Program) -> Iterator[tuple[str, Structure]]:
    """The structure of every unit; equal layers are looked at once."""
    known: dict[Any, Structure] = {}
    for path, unit in program.units.items():
        root = program.model.get_submodule(path)
        shapes = tuple((name, tuple(p.shape)) for name, p in root.named_parameters(remove_duplicate=False))
        key = (unit.key, shapes)
        if key not in known:
            known[key] = structure_of(unit.graph, root)
        yield path, known[key]


def structure_of(graph: fx.Graph, root: nn.Module) -> Structure:
    """Branches and groups of one unit, or of a whole model as one graph."""
    stream = stream_of(graph)
    entries = [stream] if stream else [n for n in graph.nodes if n.op == "placeholder" and _is_tensor(n)]
    labelling = label(graph, root, stream.name if stream else None)
    branches = tuple(
        placed_apart(
            Branch(term.site, "", term.role, term.modules, term.join.name, term.value.name)
            for term in terms(graph, root, entries, labelling.values)
        )
    )
    groups: list[Group] = []
    refused: list[tuple[str, str]] = []
    found = groups_of(labelling)
    for group, items in zip(found.groups, found.items, strict=True):
        try:
            attributes = attributes_of(group, items, labelling, labelling.roots(), root)
            groups.append(replace(group, attributes=attributes))
        except Baked as why:
            refused.append((group.site, str(why)))
    for found_experts in expert_groups(graph, root, labelling):
        if isinstance(found_experts, Group):
            groups.append(found_experts)
        else:
            refused.append(found_experts)
    return Structure(branches, tuple(groups), (*found.refused, *refused), found.leaving)


def placed_apart(branches: Iterable[Branch]) -> Iterator[Branch]:
    """Branches with sites of their own: where several lie in the same module, the first that only one of them runs."""
    branches = list(branches)
    shared = Counter(b.site for b in branches)
    for branch in branches:
        own = [part for part in branch.parts if part not in shared]
        yield replace(branch, site=own[0]) if shared[branch.site] > 1 and own else branch


def _once(refused: Iterable[tuple[str, str]], whole: bool) -> Iterator[tuple[str, str]]:
    """One reason per child of the unit, and one of its experts: the first, what follows from it isn't news. Of a whole
    model, per site."""
    seen = set()
    for site, why in refused:
        child = site if whole or why.startswith(WHOLE) else site.split(".")[0]
        if child not in seen:
            seen.add(child)
            yield site, why


def told_apart(groups: Iterable[Group]) -> Iterator[Group]:
    """Groups with sites of their own: where several lie in the same module, the module that makes or reads them, and
    of heads the attention around it."""
    groups = list(groups)
    shared = Counter((g.site, g.kind) for g in groups)
    taken = {key for key, count in shared.items() if count == 1}
    for group in groups:
        if shared[group.site, group.kind] == 1:
            yield group
            continue
        owners = [m.tensor.rpartition(".")[0] for m in (*group.members, group.members[0])]
        owners = [*(o.rpartition(".")[0] for o in owners if group.kind != "channels"), *owners]
        site = next((s for s in owners if (s, group.kind) not in taken), group.site)
        taken.add((site, group.kind))
        yield replace(group, site=site)


def stream_of(graph: fx.Graph) -> fx.Node | None:
    """The placeholder that carries the residual stream: the first one of the shape of the unit's result."""
    *_, output = graph.nodes
    results = [x.meta.get("shape") for x in output.all_input_nodes]
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.meta.get("shape") in results]
    return inputs[0] if inputs and inputs[0].meta.get("shape") is not None else None


def _is_tensor(node: fx.Node) -> bool:
    shape = node.meta.get("shape")
    return shape is not None and all(isinstance(n, int) for n in shape)


def parts_of(model: nn.Module) -> Iterator[Part]:
    for path, module in model.named_modules():
        if isinstance(module, KernelLinear):  # as large as before: what packing saves is told in bytes
            shape, bias = (module.out_features, module.in_features), module.bias
            yield Part(path, "KernelLinear", (("weight", shape), *([] if bias is None else [("bias", shape[:1])])))
            continue
        tensors = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
        if tensors:
            yield Part(path, type(module).__name__, tensors)


def tied_tensors(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names that are one parameter, in order of registration."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return (tuple(same) for same in names.values() if len(same) > 1)


def facts_of(model: nn.Module, program: Program) -> dict[str, Any]:
    """What a reader wants to know first; None where a model has no such thing."""
    config = model.config.get_text_config() if _is_pretrained(model) else None
    first = next(iter(program.units.values()), None)
    stream = stream_of(first.graph) if first else None
    calls = [n for n in first.graph.nodes if n.meta.get("role") == "attention"] if first else []
    heads = getattr(config, "num_attention_heads", None)
    return {
        "hidden": stream.meta["shape"][-1] if stream else None,
        "layers": len(program.units),
        "vocab": _vocabulary(model),
        "positions": getattr(config, "max_position_embeddings", None),
        "layer_class": _only({type(model.get_submodule(path)).__name__ for path in program.units}),
        "active_experts": getattr(config, "num_experts_per_tok", None),
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", heads),
        "head_dim": calls[0].args[1].meta["shape"][-1] if calls else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "causal_lm": type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    }


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids are embedded; None for models that read none."""
    try:
        embedding = model.get_input_embeddings() if _is_pretrained(model) else None
    except NotImplementedError:  # convolutional nets embed nothing
        return None
    return embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None


def _only(values: set[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def join(path: str, below: str) -> str:
    return ".".join(x for x in (path, below) if x)


def _placed_branch(branch: Branch, path: str) -> Branch:
    parts = tuple(join(path, part) for part in branch.parts)
    return replace(branch, unit=path, site=join(path, branch.site), parts=parts)


def _placed_group(group: Group, path: str) -> Group:
    return replace(
        group,
        site=join(path, group.site),
        members=tuple(replace(m, tensor=join(path, m.tensor)) for m in group.members),
        attributes=tuple((join(path, module), name, per) for module, name, per in group.attributes),
    )


def _is_pretrained(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    return isinstance(model, PreTrainedModel)


def _model_type(model: nn.Module) -> str:
    return model.config.model_type if _is_pretrained(model) else type(model).__name__
