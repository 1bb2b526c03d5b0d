"""The two sides of an encoder with a decoder, in one graph: what reads a source, and what says a target.

A node that is made of the target, or of both, is the decoder's; one that is made of the source alone is the
encoder's, keys and values of cross attention among them; one that is made of neither is read on both sides.
"""

from dataclasses import dataclass

from torch import fx

_TARGET = "decoder_"  # begins the names of what a target's side is given


@dataclass(frozen=True)
class Side:
    """What one walk reads.

    ids       the placeholder of its token ids
    nodes     of the graph, in their order
    encodes   whether another side recalls what is made here
    """

    ids: str
    nodes: tuple[fx.Node, ...]
    encodes: bool = False

    def owns(self, name: str) -> str:
        """What a placeholder is to a model of one side: "" where it is the other side's."""
        if name.startswith(_TARGET):
            return name.removeprefix(_TARGET) if self.ids.startswith(_TARGET) else ""
        return "" if self.ids.startswith(_TARGET) else name


def only(graph: fx.Graph) -> Side:
    """A graph of one sequence."""
    return Side("input_ids", tuple(graph.nodes))


def both(graph: fx.Graph) -> tuple[Side, Side]:
    """The encoder's side and the decoder's."""
    said: set[fx.Node] = set()
    for node in graph.nodes:
        begins = node.op == "placeholder" and node.target.startswith(_TARGET)
        if begins or node.op == "output" or any(used in said for used in node.all_input_nodes):
            said.add(node)
    heard = tuple(node for node in graph.nodes if node not in said)
    return Side("input_ids", heard, True), Side(f"{_TARGET}input_ids", tuple(graph.nodes))
