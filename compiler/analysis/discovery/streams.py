"""The residual stream of a model: its channels, as one group through embeddings, norms, layers and head.

Layers alone don't show it, as it enters and leaves each of them; so the whole model is looked at as one graph, on which
norms hand channels on: their weights are narrowed with the stream.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ....dsl.checker.skeleton import Group, Member, Skeleton
from ....dsl.syntax.diagnostics import Reject
from ...ir.capture.capture import full_model_unit
from ...ir.capture.patches import patch_module_calls
from ...ir.program import Program
from .coupling import IrregularLayout, module_path_of_tensor, segments_of_first_item
from .dependent_integers import Baked, attribute_changes_per_item
from .discover import names_of_tied_parameters, skeleton_of
from .experts import with_width_multiple
from .labelling import NO_LABEL, Labelling
from .labels import label_graph
from .mixers.graphs import mixer_graphs
from .residual import common_ancestor_module

OUTSIDE = -1  # of all units
_SIZE = re.compile(r"hidden|dim|size")


class FixedStream(Exception):
    """The stream can't be narrowed. The text says why."""


def skeleton_with_stream(program: Program) -> Skeleton:
    """The skeleton of a program with its residual stream, or the reason why that has its width."""
    stream = stream_group_or_refusal(program)
    if isinstance(stream, Group):
        return replace(skeleton_of(program), stream=stream)
    return replace(skeleton_of(program), facts={**skeleton_of(program).facts, "fixed_stream": stream})


def stream_group_or_refusal(program: Program) -> Group | str:
    """The stream's channels as a group, or why they can't go; computed once per version of a program."""
    return program.analysis(_find_stream_group_or_refusal)


@patch_module_calls()
def _find_stream_group_or_refusal(program: Program) -> Group | str:
    try:
        labelling = _label_model(program)
        return _stream_group(program, labelling)
    except FixedStream as reason:
        return str(reason)
    except Reject as rejection:  # the model is no graph as a whole
        return rejection.diagnostics[0].message


def _label_model(program: Program) -> Labelling:
    """Labels of the whole model; tied tensors have the same ones."""
    inner = {path: mixer.graph for path, mixer in mixer_graphs(program).items() if mixer.graph is not None}
    labelling = Labelling(norms_couple=False, inner_graphs=inner)
    graph = full_model_unit(program).graph
    label_graph(graph, program.model, None, labelling)
    # Graphs of modules that were opened are looked at, never run: numbers in them don't count.
    labelling.values = {node: value for node, value in labelling.values.items() if node.graph is graph}
    first = {name: same[0] for same in names_of_tied_parameters(program.model) for name in same}
    claimed: dict[tuple[str, int], np.ndarray] = {}
    for claim in labelling.claims:
        labels = claimed.setdefault((first.get(claim.tensor, claim.tensor), claim.axis), claim.labels)
        if labels is not claim.labels:
            labelling.edges.append(np.stack([labels, claim.labels]))
    return labelling


def _stream_group(program: Program, labelling: Labelling) -> Group:
    root = labelling.component_roots()
    roots = _stream_roots(program, labelling, [root[claim.labels] for claim in labelling.claims])
    writers, readers = _stream_members(program, labelling, roots)
    if not writers or not readers:
        raise FixedStream("nothing makes or reads it by a matrix of its own")
    members = (*writers, *readers)
    site = common_ancestor_module(list(program.units)) or common_ancestor_module(
        [module_path_of_tensor(m.tensor) for m in members]
    )
    group = Group(site, "width", len(roots), members, readers=len(readers))
    try:
        attributes = attribute_changes_per_item(group, [frozenset({r}) for r in roots], labelling, root, program.model)
    except Baked as error:
        raise FixedStream(str(error)) from error
    attributes += tuple(_width_attributes_of_opened_modules(program, group))
    return with_width_multiple(replace(group, attributes=attributes), program.model)


def _stream_members(
    program: Program, labelling: Labelling, roots: list[int]
) -> tuple[tuple[Member, ...], tuple[Member, ...]]:
    """Tensors that make the channels, and matrices that read them and make none: of tied tensors, the first name."""
    first = {name: same[0] for same in names_of_tied_parameters(program.model) for name in same}
    item_of = np.full(labelling.count, -1)
    item_of[roots] = np.arange(len(roots))
    by_axis: dict[bool, dict[tuple[str, int], Member]] = {False: {}, True: {}}
    root = labelling.component_roots()
    for claim in labelling.claims:
        items = item_of[root[claim.labels]]
        if (items >= 0).any():
            tensor = first.get(claim.tensor, claim.tensor)
            try:
                member = Member(tensor, claim.axis, segments_of_first_item(items, len(roots), tensor))
            except IrregularLayout as error:
                raise FixedStream(str(error)) from error
            by_axis[claim.reads].setdefault((tensor, claim.axis), member)
    writers, readers = by_axis[False], by_axis[True]
    return tuple(writers.values()), tuple(m for axis, m in readers.items() if axis not in writers)


def _width_attributes_of_opened_modules(program: Program, stream: Group) -> Iterator[tuple[str, str, float]]:
    """Numbers of experts and routers, which stay whole when they run, that are the stream's width and are read."""
    for node in full_model_unit(program).graph.nodes:
        if node.op == "call_module" and node.meta.get("role") in ("experts", "router"):
            module = program.model.get_submodule(str(node.target))
            read = inspect.unwrap(type(module).forward).__code__.co_names
            for name, value in vars(module).items():
                if type(value) is int and value == stream.count and name in read and _SIZE.search(name):
                    yield str(node.target), name, 1.0


def _stream_roots(program: Program, labelling: Labelling, roots_by_claim: list[np.ndarray]) -> list[int]:
    """Roots of the channels that all layers share, in the order in which a tensor has them."""
    root = labelling.component_roots()
    lowest, highest = np.full(labelling.count, len(program.units)), np.full(labelling.count, OUTSIDE)
    units = [_unit_index_of_tensor(program, claim.tensor) for claim in labelling.claims]
    for unit, owner in zip(units, roots_by_claim, strict=True):
        np.minimum.at(lowest, owner, unit)
        np.maximum.at(highest, owner, unit)
    is_shared = lowest < highest
    is_shared[NO_LABEL] = False
    for labels in (*(x for a in labelling.attentions for x in (a.q, a.kv)), *labelling.weighed):
        is_shared[root[labels]] = False  # heads that share a table of biases
    layouts: dict[frozenset[int], list[tuple[int, bool, list[int]]]] = {}
    for unit, claim, owner in zip(units, labelling.claims, roots_by_claim, strict=True):
        channels = list(dict.fromkeys(owner[is_shared[owner]].tolist()))
        if channels:
            layouts.setdefault(frozenset(channels), []).append((unit, claim.reads, channels))
    if not layouts:
        raise FixedStream("no channels are handed from layer to layer")
    widest = max(layouts.values(), key=len)
    for reads in (False, True):
        if not {unit for unit, is_read, _ in widest if is_read is reads}.issuperset(range(len(program.units))):
            sizes = ", ".join(str(size) for size in sorted(map(len, layouts), reverse=True))
            unknown = [reason for _, reason in labelling.blocked]
            raise FixedStream(
                unknown[0] if unknown else f"not all layers share one: there are some of {sizes} channels"
            )
    channels = widest[0][2]
    if reason := _stream_rejection_reason(labelling, root, channels):
        raise FixedStream(reason)
    return channels


def _unit_index_of_tensor(program: Program, tensor: str) -> int:
    return next((i for i, path in enumerate(program.units) if tensor.startswith(f"{path}.")), OUTSIDE)


def _stream_rejection_reason(labelling: Labelling, root: np.ndarray, channels: list[int]) -> str:
    """Why channels can't go; "" where they can."""
    on_stream = np.zeros(labelling.count, bool)
    on_stream[channels] = True
    if reason := next((reason for labels, reason in labelling.blocked if on_stream[root[labels]].any()), ""):
        return reason
    if on_stream[root[labelling.output]].any():
        return "the model returns it"
    if any(on_stream[root[labels]].any() for labels, _ in labelling.chosen):
        return "its channels are chosen by what they hold"
    return "" if len(channels) > 1 else "something mixes all its channels that is no norm with weights"
