"""A program with choices: a family of models that share their weights, in which every choice is a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ....dsl.checker.inputs import rank_too_large_diagnostic
from ....dsl.checker.skeleton import Part, Skeleton
from ....dsl.syntax.diagnostics import Reject
from ....kernels.grid import Grid
from ...analysis.discovery.discover import skeleton_of
from ...core.cache import Cache
from ...core.quantity import count_text, si_count
from ...ir.layers.linear import weight_of
from ...ir.outcome import Members, Outcome, Point
from ...ir.program import Program
from ...ir.weights import assign_tensors
from ...models.checkpoints.origin import Origin
from ..search.masks import is_sparse
from ..training.adapters import Adapters, AdapterShape, with_adapters
from ..training.unmerged import UnmergedAdapters
from .choices import RANK, ChoiceSampler, Space
from .form_checks import assert_family_fits_program
from .norms import recalibrate_batch_norms, with_batch_norm_statistics_restored
from .subnet_masks import SubnetMasks, cut_program_to_choice, skeleton_of_choice

if TYPE_CHECKING:
    from ...ir.step_results import StepResults

NORMS = "rows for norms"  # among a family's tensors; no parameter's name has spaces


@dataclass
class Family(Outcome):
    """A program, and what may be chosen of it: every choice is a smaller program that shares its weights.

    base      key of the program's own result; "" of the recipe's model, None of the model that the step works on
    space     the choices
    shape     of adapters: the largest rank, scale and dropout; of every choice the scale is alpha / largest rank
    tensors   of adapters, as `UnmergedAdapters` has them; none where the weights themselves were trained, or nothing
              was
    masked    whether adapters give nothing where a sparse weight is zero
    orders    "SITE:KIND" -> items of a group, those that a narrower choice does without first in front
    weights   parameters that were trained, by name; `program` has them
    losses    (choice, loss) of steps of training, where they were recorded
    norms     rows over which every choice has its statistics of BatchNorm measured, the largest one where anything was
              trained; None of a model that has no such norms
    grid      that weights and adapters are rounded to, together, in every choice; None: they are not
    crops     what was learned for smaller kernels of convolutions, as `kernels.place_of` names it
    """

    kind: ClassVar[str] = "family"
    entry_key: ClassVar[str] = "family"
    program: Program
    base: str | None
    space: Space
    shape: AdapterShape | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    masked: bool = False
    orders: Mapping[str, Sequence[int]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Sequence[tuple[Mapping[str, int], float]] = ()
    norms: Tensor | None = None
    grid: Grid | None = None
    crops: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        trained = sum(t.numel() for t in self._learned.values())
        dims = count_text(len(self.space.dims), "elastic dimension")
        return f"{dims}, {si_count(self.space.size)} choices, {si_count(trained)} trained"

    @property
    def _learned(self) -> dict[str, Tensor]:
        return {**self.tensors, **self.weights, **self.crops}

    def members(self) -> Members:
        """The program as the largest choice, for as long as it is its turn."""
        with self.with_choice_applied(self.space.choice("largest")):
            yield "", self.program

    def store(self, cache: Cache, origin: Origin) -> dict[str, Any]:
        return {
            "family": self.to_json(),
            "needs": [self.base] if self.base else [],
            "tensors": {name: cache.store_tensor(tensor) for name, tensor in self.stored.items()},
        }

    @classmethod
    def restore(cls, body: Mapping[str, Any], results: "StepResults") -> "Family":
        tensors = {name: results.cache.load_verified_tensor(blob) for name, blob in body["tensors"].items()}
        family = cls.from_json_assigning_weights(body["family"], results.base_program(body["family"]["base"]), tensors)
        assert_family_fits_program(family)
        family.program.notes = list(body["notes"].get("program", ()))
        return family

    def with_base(self, key: str) -> "Family":
        return replace(self, base=key) if self.base is None else self

    def program_at(self, point: Point) -> Program:
        assert point.choice is not None, f"{point.name} is no choice"
        return self.cut_program_to_choice(point.choice)

    def extract_adapters(self, choice: Mapping[str, int]) -> dict[str, Tensor]:
        """The adapters of a choice alone."""
        tensors = {}
        for path, rank in self.ranks_by_path(choice).items():
            tensors[f"{path}.lora_A"] = self.tensors[f"{path}.lora_A"][:rank].contiguous()
            tensors[f"{path}.lora_B"] = self.tensors[f"{path}.lora_B"][:, :rank].contiguous()
        return tensors

    def ranks_by_path(self, choice: Mapping[str, int]) -> dict[str, int]:
        """Of every adapted module; one without an elastic dimension has the largest."""
        return dict.fromkeys(self.paths, self.shape.rank) | self.space.by_path(choice, RANK)

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules that have an adapter."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))

    @property
    def has_dims_besides_ranks(self) -> bool:
        """Whether more than ranks may be chosen."""
        return any(dim.kind != RANK for dim in self.space.dims)

    def unmerged_adapters_of(self, choice: Mapping[str, int]) -> UnmergedAdapters:
        assert self.shape is not None, "the family has no adapters"
        return UnmergedAdapters(self.program, self.base, self.shape, self.extract_adapters(choice))

    @contextmanager
    def with_switchable_choice(self) -> Iterator[Callable[[Mapping[str, int]], None]]:
        """Within, the program computes what the choice does that was handed to `take` last."""
        switches = SubnetMasks(self.program, self.space, self.orders, self.crops)
        with ExitStack() as stack:
            sampler = ChoiceSampler(self.space, 0, on_choice=switches.set_active_subnet)
            if self.shape is not None:
                adapters = stack.enter_context(self._with_loaded_adapters(self.tensors))
                sampler.ranks.update(dict.fromkeys(self.paths, self.shape.rank))
                adapters.follow_ranks(sampler.ranks)
            stack.enter_context(switches.hooks_installed())
            if self.norms is None:
                yield sampler.activate
                return
            stack.enter_context(with_batch_norm_statistics_restored(self.program.model))
            yield partial(self._activate_and_measure_norms, sampler)

    def _activate_and_measure_norms(self, sampler: ChoiceSampler, choice: Mapping[str, int]) -> None:
        sampler.activate(choice)
        self._measure_norms(choice)

    def _measure_norms(self, choice: Mapping[str, int]) -> None:
        """The largest choice of what was not trained is the program itself, whose statistics are right."""
        trained = self.tensors or self.weights  # kernels that were learned are none of the largest's
        if self.norms is not None and (trained or choice != self.space.choice("largest")):
            recalibrate_batch_norms(self.program.model, self.norms)

    @contextmanager
    def with_choice_applied(self, choice: Mapping[str, int]) -> Iterator[None]:
        """The program computes what a choice does."""
        with self.with_switchable_choice() as take:
            take(choice)
            yield

    @contextmanager
    def _with_loaded_adapters(self, tensors: Mapping[str, Tensor]) -> Iterator[Adapters]:
        assert self.shape is not None, "the family has no adapters"
        zeros: Literal["keep", "fill"] = "keep" if self.masked else "fill"
        with with_adapters(
            self.program.model, self.paths, self.shape, init_seed=0, zeros=zeros, rounding_grid=self.grid
        ) as adapters:
            adapters.load(tensors)
            for layer in adapters.layers.values():
                layer.eval()  # new modules would drop some of what they are given
            yield adapters

    def cut_program_to_choice(self, choice: Mapping[str, int]) -> Program:
        """The smaller program that a choice is, its adapters merged; the family is no more."""
        if self.shape is not None:
            with self._with_loaded_adapters(self.extract_adapters(choice)) as adapters:
                adapters.merge_into_weights()
            self.program.changed()
        if self.has_dims_besides_ranks:
            cut_program_to_choice(self.program, self.space, self.orders, choice, self.crops)
        self._measure_norms(choice)
        if self.weights or self.norms is not None:
            self.program.changed()
        self.program.note(choice=dict(choice))
        return self.program

    def smaller_skeleton(self, choice: Mapping[str, int]) -> Skeleton:
        """The skeleton of what `cut_program_to_choice` gives."""
        return skeleton_of_choice(skeleton_of(self.program), self.space, choice)

    @property
    def acts_on_zeros(self) -> bool:
        """Whether one of the weights beneath is sparse."""
        model = self.program.model
        return any(is_sparse(weight_of(model.get_submodule(path))) for path in self.paths)

    def to_json(self) -> dict[str, Any]:
        """All but the program, and of tensors the names."""
        return {
            "base": self.base or "",
            "space": self.space.to_json(),
            "shape": vars(self.shape) if self.shape else None,
            "masked": self.masked,
            "orders": {site: list(items) for site, items in self.orders.items()},
            "weights": list(self.weights),
            "losses": [[dict(choice), loss] for choice, loss in self.losses],
            "norms": self.norms is not None,
            "grid": vars(self.grid) if self.grid else None,
            "crops": list(self.crops),
        }

    @property
    def stored(self) -> dict[str, Tensor]:
        """All tensors that a family has beside its program."""
        return {**self._learned, **({NORMS: self.norms} if self.norms is not None else {})}

    @classmethod
    def from_json_assigning_weights(
        cls, body: Mapping[str, Any], program: Program, tensors: Mapping[str, Tensor]
    ) -> "Family":
        """`program` is the base's; trained weights among the tensors are put into it."""
        weights = {name: tensors[name] for name in body["weights"]}
        norms = tensors[NORMS] if body.get("norms") else None
        crops = {name: tensors[name] for name in body.get("crops", ())}
        other = {NORMS, *weights, *crops}
        if weights:
            assign_tensors(program.model, weights)
        return cls(
            program,
            body["base"],
            Space.from_json(body["space"]),
            AdapterShape(**body["shape"]) if body["shape"] else None,
            {name: tensor for name, tensor in tensors.items() if name not in other},
            body["masked"],
            {site: list(items) for site, items in body["orders"].items()},
            weights,
            tuple((dict(choice), loss) for choice, loss in body["losses"]),
            norms,
            Grid(**body["grid"]) if body.get("grid") else None,
            crops,
        )


def refuse_too_large_ranks(ranks: Sequence[int], parts: Sequence[Part]) -> None:
    """Reject (unfit-ranks) a rank that is larger than a module."""
    if fault := rank_too_large_diagnostic(parts, ranks):
        raise Reject(fault)
