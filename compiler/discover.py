"""From captured graphs to a `Skeleton`: what a model is made of, found without names of any architecture."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..dsl.skeleton import Branch, Group, Part, Skeleton
from .coupling import groups_of
from .following import Baked, attributes_of
from .labels import label
from .program import Program
from .residual import terms
from .state_space import state_space


@dataclass(frozen=True)
class Structure:
    """What one unit holds, paths below it."""

    branches: tuple[Branch, ...]
    groups: tuple[Group, ...]
    refused: tuple[tuple[str, str], ...]


def discover(program: Program) -> Skeleton:
    """The skeleton of a captured model. Reads shapes and attributes only, so the meta device will do."""
    model = program.model
    tied = tuple(tied_tensors(model))
    branches, groups, refused = [], [], []
    for path, structure in structures(program):
        branches += [_placed_branch(b, path) for b in structure.branches]
        refused += [[join(path, site), why] for site, why in structure.refused]
        for group in structure.groups:
            placed = _placed_group(group, path)
            shared = _shared(placed, tied)
            if shared:
                refused.append([placed.site, f"{shared} is shared with another module"])
            else:
                groups.append(placed)
    mixers = state_space(program)
    groups += [group for group in mixers.groups if not _shared(group, tied)]
    refused = [entry for entry in refused if entry[0] not in mixers.mixers] + [list(entry) for entry in mixers.refused]
    return Skeleton(
        model_type=_model_type(model), parts=tuple(parts_of(model)), units=tuple(program.units),
        branches=tuple(branches), groups=tuple(groups), tied=tied, opaque=tuple(program.opaque.items()),
        scans=mixers.scans,
        facts={**facts_of(model, program), "refused": refused})


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
    """Branches and groups of one unit."""
    stream = stream_of(graph)
    if stream is None:
        return Structure((), (), ())
    labelling = label(graph, root, stream.name)
    branches = tuple(
        Branch(term.site, "", term.role, term.modules, term.join.name, term.value.name)
        for term in terms(graph, root, stream, labelling.values))
    groups, refused = [], []
    found = groups_of(labelling)
    for group, items in zip(found.groups, found.items, strict=True):
        try:
            attributes = attributes_of(group, items, labelling, labelling.roots(), root)
            groups.append(replace(group, attributes=attributes))
        except Baked as why:
            refused.append((group.site, str(why)))
    return Structure(branches, tuple(groups), tuple(_once((*found.refused, *refused))))


def _once(refused: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """One reason per child of the unit: the first, what follows from it isn't news."""
    seen = set()
    for site, why in refused:
        child = site.split(".")[0]
        if child not in seen:
            seen.add(child)
            yield site, why


def stream_of(graph: fx.Graph) -> fx.Node | None:
    """The placeholder that carries the residual stream: the first one of the shape of the unit's result."""
    *_, output = graph.nodes
    results = [x.meta.get("shape") for x in output.all_input_nodes]
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.meta.get("shape") in results]
    return inputs[0] if inputs and inputs[0].meta.get("shape") is not None else None


def parts_of(model: nn.Module) -> Iterator[Part]:
    for path, module in model.named_modules():
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
    embedding = model.get_input_embeddings() if _is_pretrained(model) else None
    vocab = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None
    config = model.config.get_text_config() if _is_pretrained(model) else None
    first = next(iter(program.units.values()), None)
    stream = stream_of(first.graph) if first else None
    calls = [n for n in first.graph.nodes if n.meta.get("role") == "attention"] if first else []
    heads = getattr(config, "num_attention_heads", None)
    return {
        "hidden": stream.meta["shape"][-1] if stream else None,
        "layers": len(program.units),
        "vocab": vocab,
        "positions": getattr(config, "max_position_embeddings", None),
        "layer_class": _only({type(model.get_submodule(path)).__name__ for path in program.units}),
        "active_experts": getattr(config, "num_experts_per_tok", None),
        "heads": heads, "kv_heads": getattr(config, "num_key_value_heads", heads),
        "head_dim": calls[0].args[1].meta["shape"][-1] if calls else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "causal_lm": type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    }


def _only(values: set[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def join(path: str, below: str) -> str:
    return ".".join(x for x in (path, below) if x)


def _placed_branch(branch: Branch, path: str) -> Branch:
    parts = tuple(join(path, part) for part in branch.parts)
    return replace(branch, unit=path, site=join(path, branch.site), parts=parts)


def _placed_group(group: Group, path: str) -> Group:
    return replace(
        group, site=join(path, group.site),
        members=tuple(replace(m, tensor=join(path, m.tensor)) for m in group.members),
        attributes=tuple((join(path, module), name, per) for module, name, per in group.attributes))


def _shared(group: Group, tied: Iterable[tuple[str, ...]]) -> str | None:
    """A tensor of the group that another module owns, too."""
    names = {name for same in tied for name in same}
    return next((m.tensor for m in group.members if m.tensor in names), None)


def _is_pretrained(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel)


def _model_type(model: nn.Module) -> str:
    return model.config.model_type if _is_pretrained(model) else type(model).__name__
