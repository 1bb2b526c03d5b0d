"""Interventions on the residual stream, which ReFT trains while the model stays as it is.

Source: ReFT (Wu et al. 2024, arXiv 2404.03592), section 3.2 and appendix; names of the further forms as in its code.

The rows R of the forms that want them orthonormal are a function of an unconstrained parameter, their Gram-Schmidt
basis by Cholesky. `torch.nn.utils.parametrizations.orthogonal` lost here: it keeps a base and a skew part of which
saving the computed rows alone forgets one, so that training after a reload leaves the manifold at the first step; and
it gives every module a class of its own, which stored edits could not name. Here the rows themselves may be put in the
parameter's place at any time, and are their own basis.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ...models.rows.prompt_positions import Cells, Prompts, get_or_attach_prompts


@dataclass(frozen=True)
class Form:
    """Update of a hidden state h by an intervention: P^T (A h + b - P h), or less of it.

    orthonormal   the rows of P are
    aims          it has A; without it, the target of P h is the same for every h
    subtracts     P h is taken away: the coordinates in the span of P are replaced, not moved
    """

    formula: str
    orthonormal: bool
    aims: bool
    subtracts: bool


FORMS = {
    "loreft": Form("h + R'(Wh + b - Rh)", True, True, True),
    "noreft": Form("h + V'(Wh + b - Vh)", False, True, True),
    "direft": Form("h + V'(Wh + b)", False, True, False),
    "odireft": Form("h + R'(Wh + b)", True, True, False),
    "consreft": Form("h + R'(b - Rh)", True, False, True),
    "lobireft": Form("h + R'b", True, False, False),
}
STARTS = ("identity", "random")
_MAX_SIZE = 1 << 20  # of any size that a stored spec says


class Intervention(nn.Module):
    """One function of hidden states.

    project   [r, d]: P, or what the rows of P are the orthonormal basis of
    aim       [r, d]: A, or None
    bias      [r]
    All in float32 (float64 in a float64 model), whatever the model computes in.
    Dropout is of the edited hidden state, not of the edit: as in the published code.
    """

    def __init__(self, form: str, width: int, rank: int, drop: float, **factory: Any):
        super().__init__()
        self.form, self.drop = form, drop
        self.project = nn.Parameter(torch.zeros(rank, width, **factory))
        self.aim = nn.Parameter(torch.zeros(rank, width, **factory)) if FORMS[form].aims else None
        self.bias = nn.Parameter(torch.zeros(rank, **factory))

    def projection_rows(self) -> Tensor:
        """P [r, d]."""
        return orthonormalize(self.project) if FORMS[self.form].orthonormal else self.project

    def forward(self, hidden: Tensor, active: Tensor | None = None) -> Tensor:
        """hidden [n, d] -> [n, d]; active [n, r] bool, or [r]: coordinates that are edited, all where it is None."""
        form, work = FORMS[self.form], torch.promote_types(hidden.dtype, torch.float32)
        h, p = hidden.to(work), self.projection_rows().to(work)
        edit = self.bias.to(work).expand(len(h), -1)  # [n, r]
        if form.aims and form.subtracts:
            # Not one product with A - P: where A is P bit for bit, so is what comes out.
            edit = linear(h, self.aim.to(work)) - linear(h, p) + edit
        elif form.aims:
            edit = linear(h, self.aim.to(work)) + edit
        elif form.subtracts:
            edit = edit - linear(h, p)
        if active is not None:
            edit = edit * active
        return dropout(h + edit @ p, self.drop, self.training).to(hidden.dtype)

    @torch.no_grad()
    def low_rank_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(down [r, d], up [d, r], bias [r]) of an update h + up (down h + bias), float32."""
        form, p = FORMS[self.form], self.projection_rows().float()
        down = torch.zeros_like(p) if self.aim is None else self.aim.float()
        return down - p if form.subtracts else down, p.T.contiguous(), self.bias.float()

    @torch.no_grad()
    def init_weights(self, method: str, generator: torch.Generator) -> None:
        """First values. "identity" changes nothing yet; "random" is that of the published code."""
        form, width = FORMS[self.form], self.project.shape[1]
        spread = width**-0.5  # torch's own of a Linear
        for parameter in (self.project, self.aim, self.bias):
            if parameter is not None:
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((2 * noise - 1) * spread)
        if form.orthonormal:
            normal = torch.randn(self.project.shape, generator=generator, dtype=torch.float64)
            self.project.copy_(torch.linalg.qr(normal.T)[0].T)
        if method == "identity":
            assert has_identity(self.form), f"{self.form} is no identity whatever its bias"
            self.bias.zero_()
            if form.subtracts:
                self.aim.copy_(self.projection_rows())
            elif form.orthonormal and form.aims:
                self.aim.zero_()
            elif form.aims:
                self.project.zero_()

    @torch.no_grad()
    def store_orthonormal_rows(self) -> None:
        """Let the parameter be the rows that it stands for, so that who reads it from a file has them."""
        self.project.copy_(self.projection_rows())


def has_identity(form: str) -> bool:
    """Whether some values make it change nothing: not where all coordinates get the same target."""
    return FORMS[form].aims or not FORMS[form].subtracts


def orthonormalize(rows: Tensor) -> Tensor:
    """Rows [r, d] made orthonormal one after the other, r <= d; such rows are left as they are.

    Twice, since once leaves an error that grows with the square of how far they were off.
    Source: CholeskyQR2, Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm".
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    for _ in range(2):
        factor = torch.linalg.cholesky(rows @ rows.T)
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
    return rows.contiguous()  # as parameters lie: products with equal rows are then equal to the bit


class Reft(nn.Module):
    """The interventions of one layer: hidden states [b, t, d] with those at the edges of prompts edited.

    first, last   how many positions in front of and behind a prompt
    tied          one function for both edges, else one for each
    A swappable module (`edits.Swappable`) that is new in its layer, called as `reft` at the end of the layer's graph.
    """

    def __init__(
        self, form: str, width: int, rank: int, first: int, last: int, tied: bool, drop: float, **factory: Any
    ):
        super().__init__()
        self.first, self.last, self.tied = first, last, tied
        names = ("both",) if tied and first and last else [n for n, k in (("prefix", first), ("suffix", last)) if k]
        self.functions = nn.ModuleDict({name: Intervention(form, width, rank, drop, **factory) for name in names})
        self.prompts = Prompts()  # until `share_prompt_positions` gives all of a model the same

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.prompts.on or hidden.is_meta:
            return hidden
        spans = self.prompts.first_and_last_prompt_cells(hidden, self.first, self.last)
        if spans is None:
            return hidden
        prefix, suffix = spans
        if "both" in self.functions:
            both = Cells(torch.cat([prefix.rows, suffix.rows]), torch.cat([prefix.columns, suffix.columns]))
            return self._edit_cells(hidden, both, self.functions["both"])
        for name, cells in (("prefix", prefix), ("suffix", suffix)):
            if name in self.functions:
                hidden = self._edit_cells(hidden, cells, self.functions[name])
        return hidden

    def interventions(self) -> list[Intervention]:
        """One for each edge of a prompt, or one for both."""
        return list(self.functions_by_edge().values())

    def functions_by_edge(self) -> dict[str, Intervention]:
        """Interventions by "prefix", "suffix", or "both"."""
        return {name: f for name, f in self.functions.items() if isinstance(f, Intervention)}

    def _edit_cells(self, hidden: Tensor, cells: Cells, function: nn.Module) -> Tensor:
        at, active = (cells.rows, cells.columns), self.prompts.subspace
        if active is not None:
            active = active.to(hidden.device)
            active = active[cells.rows] if active.dim() == 2 else active
        return hidden.index_put(at, function(hidden[at], active))

    @property
    def shape(self) -> tuple[str, int, int]:
        """Form, width and rank, the same of all its functions."""
        function = self.interventions()[0]
        return function.form, function.project.shape[1], function.project.shape[0]

    def spec(self) -> dict[str, Any]:
        form, width, rank = self.shape
        drop = self.interventions()[0].drop
        return {
            "form": form,
            "width": width,
            "rank": rank,
            "first": self.first,
            "last": self.last,
            "tied": self.tied,
            "dropout": drop,
        }

    @classmethod
    def from_spec(cls, old: nn.Module, spec: dict[str, Any]) -> "Reft":
        """`old` is the layer that it goes into: it says where its numbers lie."""
        known = {"form", "width", "rank", "first", "last", "tied", "dropout"}
        counts = [spec.get(name) for name in ("width", "rank", "first", "last")]
        if not (
            set(spec) == known
            and spec["form"] in FORMS
            and type(spec["tied"]) is bool
            and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in counts)
            and type(spec["dropout"]) in (int, float)
            and 0 <= spec["dropout"] < 1
            and 0 < spec["rank"] <= spec["width"]
            and spec["first"] + spec["last"] > 0
        ):
            raise ValueError("interventions of another form")
        like = next((t for t in [*old.parameters(), *old.buffers()] if t.is_floating_point()), torch.empty(0))
        factory = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        return cls(
            spec["form"],
            spec["width"],
            spec["rank"],
            spec["first"],
            spec["last"],
            spec["tied"],
            float(spec["dropout"]),
            **factory,
        )

    def extra_repr(self) -> str:
        form, width, rank = self.shape
        return f"{form}, width={width}, rank={rank}, f{self.first}+l{self.last}"


def interventions(model: nn.Module) -> Iterator[tuple[str, Reft]]:
    """The interventions of a model by path, in the order of its layers."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Reft))


def share_prompt_positions(model: nn.Module) -> None:
    """Let all interventions of a model ask one object where its prompts lie; nothing where it has none."""
    modules = [module for _, module in interventions(model)]
    if modules:
        one = get_or_attach_prompts(model)
        for module in modules:
            module.prompts = one
