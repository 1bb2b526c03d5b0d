"""The two sides of an encoder with a decoder, in one graph: what reads a source, and what says a target.

A node that is made of the target, or of both, is the decoder's; one that is made of the source alone is the
encoder's, keys and values of cross attention among them; one that is made of neither is read on both sides.
"""

from dataclasses import dataclass

from torch import fx

_TARGET = "decoder_"  # begins the names of what a target's side is given


@dataclass(frozen=True)
class Stack:
    """One side of the model: encoder or decoder.

    ids       the placeholder of its token ids
    nodes     of the graph, in their order
    encodes   whether another side recalls what is made here
    """

    ids: str
    nodes: tuple[fx.Node, ...]
    encodes: bool = False

    def placeholder_role(self, name: str) -> str:
        """Role of a placeholder for one side: "" where it belongs to the other."""
        if name.startswith(_TARGET):
            return name.removeprefix(_TARGET) if self.ids.startswith(_TARGET) else ""
        return "" if self.ids.startswith(_TARGET) else name


def stack_of_all_nodes(graph: fx.Graph) -> Stack:
    """A graph of one sequence."""
    return Stack("input_ids", tuple(graph.nodes))


def split_encoder_and_decoder(graph: fx.Graph) -> tuple[Stack, Stack]:
    """The encoder's side and the decoder's."""
    decoder_nodes: set[fx.Node] = set()
    for node in graph.nodes:
        is_target = node.op == "placeholder" and node.target.startswith(_TARGET)
        if is_target or node.op == "output" or any(used in decoder_nodes for used in node.all_input_nodes):
            decoder_nodes.add(node)
    encoder_nodes = tuple(node for node in graph.nodes if node not in decoder_nodes)
    return Stack("input_ids", encoder_nodes, True), Stack(f"{_TARGET}input_ids", tuple(graph.nodes))
