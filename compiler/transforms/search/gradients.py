"""Cost estimates of candidates from one sweep of gradients instead of a forward for each.

A candidate changes what its layer gives by some delta, which that layer alone tells. To first order the loss changes by
gradient * delta; to second order by half of delta' F delta, with F the Fisher information of what the model predicts:
the mean square of (gradient * delta) where the tokens that are predicted are drawn from the model itself. Products of
tokens that lie far apart add more noise than they tell, so squares are of sums over a few tokens each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ...models.rows.forward import slices_within_chunk_bytes
from .candidate import Candidate
from .prefix import Prefix, hidden_states_of

DRAWS = 2  # of what the model predicts, for every token: the noise of what F tells falls with its root
WINDOW = 16  # tokens whose changes are taken to add up: of a whole row there would be too few sums to square
SWEEP = 2 + DRAWS  # forwards of the whole model that it takes as long as, besides a layer for every candidate


@dataclass(frozen=True)
class Estimate:
    """Nats per token that a candidate's removal costs: to first order, and what the second adds."""

    first: float
    second: float

    @property
    def growth(self) -> float:
        return self.first + self.second

    @property
    def terms(self) -> float:
        """Sum of both magnitudes."""
        return abs(self.first) + self.second


class GradientSweep:
    """A sweep over a model's layers, from the last to the first, that estimates what candidates cost.

    draws   of labels, for F
    Layers run from what `prefix` kept of them, one at a time and over again, so that no more than one layer's
    activations are held, and one gradient and `draws` more of the hidden states.

    Source: first and second order Taylor terms of gates at one (Molchanov et al. 2019, arXiv 1906.10771), taken of
    what a whole layer gives; labels that are drawn make the Fisher information (Kunstner et al. 2019, arXiv
    1905.12558).
    """

    def __init__(self, prefix: Prefix, seed: int, draws: int = DRAWS):
        self.prefix, self.seed, self.draws = prefix, seed, draws

    def estimate_if_supported(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Estimate]]:
        """Estimates, later layers first; none where the model's layers are no chain that can be entered, or where
        it is no model that predicts the next token of its rows."""
        prefix, program = self.prefix, self.prefix.program
        units = {path: number for number, path in enumerate(program.units)}
        by_layer: dict[int, list[Candidate]] = {}
        for candidate in candidates:
            if candidate.unit in units:
                by_layer.setdefault(units[candidate.unit], []).append(candidate)
        count = len(units)
        with _without_weight_gradients(program.model):
            grads, tokens = (
                self._last_layer_output_gradients_and_token_count()
                if prefix.chain and count and by_layer
                else (None, 0)
            )
            if grads is None:
                return
            for layer in reversed(range(min(by_layer), count)):
                layer_candidates = by_layer.get(layer, ())
                plain = prefix.compute_layer_outputs(layer) if layer_candidates else []
                for candidate in layer_candidates:
                    changed = prefix.outputs_of_changed_layer(layer, candidate.applied)
                    yield candidate, _taylor_estimate(grads, plain, changed, tokens)
                if layer > min(by_layer):
                    grads = [self._backpropagate_through_layer(layer, call, grad) for call, grad in enumerate(grads)]
                    prefix.layers_run += 2 + self.draws

    def _last_layer_output_gradients_and_token_count(self) -> tuple[list[Tensor] | None, int]:
        """Gradients of the summed losses by what the last layer gives, in every call [1 + draws, b, t, h]; tokens."""
        prefix, gradients, tokens = self.prefix, [], 0
        generator = torch.Generator().manual_seed(self.seed)
        for number, call in enumerate(prefix.calls):
            leaf, logits = prefix.forward_from_input_leaf(len(prefix.program.units), number)  # [b, t, vocab]
            ids = call.args[0] if call.args else None
            if not (_are_tokens(ids) and logits.shape[:-1] == ids.shape and leaf.is_leaf and logits.requires_grad):
                return None, 0
            targets = ids[:, 1:].to(logits.device)  # [b, t - 1]
            tokens += targets.numel()
            grads = []
            for draw in range(1 + self.draws):
                labels = _sample_tokens(logits.detach()[:, :-1], generator) if draw else targets
                with torch.enable_grad():
                    total = _summed_cross_entropy(logits[:, :-1], labels)
                grads.append(torch.autograd.grad(total, leaf, retain_graph=draw < self.draws)[0])
            gradients.append(torch.stack(grads))
        return gradients, tokens

    def _backpropagate_through_layer(self, layer_index: int, call_index: int, output_grads: Tensor) -> Tensor:
        """The gradients by what a layer is given, from those by what it gives."""
        leaf, output = self.prefix.forward_from_input_leaf(layer_index, call_index)
        last = len(output_grads) - 1
        return torch.stack(
            [torch.autograd.grad(output, leaf, g, retain_graph=n < last)[0] for n, g in enumerate(output_grads)]
        )


def _are_tokens(ids: object) -> TypeGuard[Tensor]:
    return isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()


def _taylor_estimate(
    grads_by_call: list[Tensor], outputs_before: list[Any], outputs_after: list[Any], token_count: int
) -> Estimate:
    first = second = 0.0
    for grad, before, after in zip(grads_by_call, outputs_before, outputs_after, strict=True):
        delta = hidden_states_of(after).float() - hidden_states_of(before).float()
        along = torch.einsum("nbth,bth->nbt", grad.float(), delta).double()
        first += along[0].sum().item()
        sums = torch.stack([part.sum(-1) for part in along[1:].split(WINDOW, -1)])  # [windows, draws, b]
        second += 0.5 * sums.square().mean(1).sum().item()
    return Estimate(first / token_count, second / token_count)


def _summed_cross_entropy(logits: Tensor, token_ids: Tensor) -> Tensor:
    total = sum(
        nn.functional.cross_entropy(row[part].float(), ids[part], reduction="sum")
        for row, ids in zip(logits, token_ids, strict=True)
        for part in slices_within_chunk_bytes(row)
    )
    assert isinstance(total, Tensor), "logits of no position"
    return total


def _sample_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for every position, drawn from what is predicted there, [b, t]."""
    rows = []
    for row in logits:
        for part in slices_within_chunk_bytes(row):
            chances = row[part].float().softmax(-1).cumsum(-1)
            at = torch.rand(len(chances), 1, generator=generator).to(chances.device)
            rows.append(torch.searchsorted(chances, at * chances[:, -1:]).clamp(max=logits.shape[-1] - 1)[:, 0])
    return torch.cat(rows).view(logits.shape[:2])


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients flow through weights, and none is taken of them."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
