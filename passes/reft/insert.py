"""Insert interventions that edit hidden states of the prompt, for `tune.reft` to train."""

from dataclasses import replace
from typing import Literal

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning.selection import layers
from ...compiler.ir.layers.reft import FORMS, has_identity
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Lossy, Pass, param
from ...compiler.transforms.editing.interventions import insert_interventions, make_interventions
from ...compiler.transforms.editing.position_spec import parse_first_last_counts
from ...compiler.transforms.training.schedule import seed_of
from ...dsl.checker.inputs import wide_rank_diagnostic
from ...dsl.checker.skeleton import Part, Skeleton
from ...dsl.checker.values import Selector
from ...dsl.syntax.diagnostics import Fault

no_identity = Fault("no-identity", "An intervention is to change nothing at first, and its form has no such values.")


class Insert(Pass):
    """Insert interventions that edit hidden states of the prompt, for `tune.reft` to train.

    Right after a layer has made its hidden states, those at the first and the last few positions of the prompt are
    edited; other positions stay, later layers read the edited ones, and decoding goes on without any edit: the cache
    carries what the prompt's edits did. A prompt is a whole row but for its padding, on the left or the right, or
    the first tokens of a row where data says so (`pairs`). It is read in one forward: pieces that a long prompt is
    read in after the first aren't edited.

    `loreft` replaces the coordinates of h in the span of R, whose r rows stay orthonormal in training, saving and
    loading: h + R'(Wh + b - Rh). `noreft` does it without orthonormal rows, `direft` moves them: h + V'(Wh + b);
    `odireft` does so with orthonormal rows (the DiReFT of the published code). `consreft` sets the coordinates to
    constants: h + R'(b - Rh), `lobireft` adds a constant: h + R'b. A function has 2dr + r parameters, dr + r in the
    last two.

    Advice of the paper: begin with all layers and more than one position, rank 4 to 32, tied. All but
    `consreft` start as the identity here, where the published code starts at random values.

    Source: ReFT (Wu et al. 2024, arXiv 2404.03592); the identity at first: own.
    Example: edits = reft.insert(positions: "f7+l7", rank: 8)
    """

    keeps = Lossy()
    acts_on = "layers"
    rank_param = "rank"
    makes = ("interventions",)
    determinism = "seeded"

    form: Literal["loreft", "direft", "noreft", "odireft", "consreft", "lobireft"] = param(
        "What an edit computes.", default="loreft"
    )
    on: Selector | None = param("Layers after which hidden states are edited; all where it is left out.", default=None)
    positions: str = param(
        "Which of the prompt: `f7` its first seven, `l7` its last seven, `f7+l7` both.",
        default="f7+l7",
        spelled=r" *(f[1-9]\d{0,5}( *\+ *l[1-9]\d{0,5})?|l[1-9]\d{0,5}( *\+ *f[1-9]\d{0,5})?) *",
    )
    rank: int = param("How many coordinates of a hidden state an edit changes.", default=8, ge=1)
    tied: bool = param("One function for the first and the last positions; false: one for each.", default=True)
    dropout: float = param(
        "Probability that a number of an edited hidden state is dropped in training.", default=0.0, ge=0, lt=1
    )
    start: Literal["identity", "random"] = param(
        "What they do before they are trained: nothing, or what comes.", default="identity"
    )

    def run(self, program: Program, ctx: Context) -> None:
        self._refuse_form_without_identity()
        chosen = layers(skeleton_of(program), self.on)
        interventions = make_interventions(
            program,
            chosen,
            self.form,
            self.rank,
            parse_first_last_counts(self.positions),
            self.tied,
            self.dropout,
            self.start,
            lambda path: seed_of("reft", ctx.seed, path),
        )
        insert_interventions(program, interventions)
        program.note(
            form=self.form,
            formula=FORMS[self.form].formula,
            layers=list(chosen),
            positions=self.positions,
            rank=self.rank,
            tied=self.tied,
            dropout=self.dropout,
            start=self.start,
            parameters=sum(p.numel() for module in interventions.values() for p in module.parameters()),
        )

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        self._refuse_form_without_identity()
        (first, last), width = parse_first_last_counts(self.positions), skeleton.facts.get("hidden") or 0
        if width and self.rank > width:
            raise wide_rank_diagnostic(self.rank, width, "").rejection()
        names = ("both",) if self.tied and first and last else ("prefix",) * bool(first) + ("suffix",) * bool(last)
        matrix, form = (self.rank, width), FORMS[self.form]
        tensors = (("project", matrix), *((("aim", matrix),) if form.aims else ()), ("bias", (self.rank,)))
        added = [
            Part(f"{path}.reft.functions.{name}", "Intervention", tensors)
            for path in layers(skeleton, self.on)
            for name in names
        ]
        return replace(skeleton, parts=(*skeleton.parts, *added))

    def _refuse_form_without_identity(self) -> None:
        if self.start == "identity" and not has_identity(self.form):
            raise no_identity(
                f"`{self.form}` sets these coordinates to constants for every hidden state, so it has no identity",
                help="`start: random`, or another form",
            ).rejection()
