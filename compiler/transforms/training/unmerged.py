"""Adapters that were trained and not merged: a step's result beside the model, which is as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...core.cache import Cache
from ...core.quantity import count_text, si_count
from ...ir.outcome import Members, Outcome
from ...ir.program import Program
from ...models.checkpoints.origin import Origin
from ...models.checkpoints.pretrained import pretrained
from .adapter_checks import assert_adapters_fit_program
from .adapters import AdapterShape, with_adapters

if TYPE_CHECKING:
    from ...ir.step_results import StepResults


@dataclass
class UnmergedAdapters(Outcome):
    """Low-rank adapters and the program that they were trained on.

    base      key of the program's own result; "" of the recipe's model, None of the model that the step works on
    shape     their rank, scale and dropout
    tensors   "PATH.lora_A" [rank, in] and "PATH.lora_B" [out, rank] for the path of each adapted module; some may
              be of a lower rank than `shape` says, scaled as if they were not
    They act on zeros of a sparse weight, too: the weight beneath keeps them.
    """

    kind: ClassVar[str] = "adapters"
    entry_key: ClassVar[str] = "adapters"
    program: Program
    base: str | None
    shape: AdapterShape
    tensors: Mapping[str, Tensor]

    @property
    def summary(self) -> str:
        trained = sum(tensor.numel() for tensor in self.tensors.values())
        return f"{count_text(len(self.paths), 'adapter')} of rank {self.shape.rank}, {si_count(trained)} parameters"

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules that have an adapter."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))

    def members(self) -> Members:
        """The program with its adapters on, for as long as it is its turn."""
        with self.with_adapters_applied():
            yield "", self.program

    def store(self, cache: Cache, origin: Origin) -> dict[str, Any]:
        return {
            "adapters": {"base": self.base or "", "shape": asdict(self.shape)},
            "needs": [self.base] if self.base else [],
            "tensors": {name: cache.store_tensor(tensor) for name, tensor in self.tensors.items()},
        }

    @classmethod
    def restore(cls, body: Mapping[str, Any], results: "StepResults") -> "UnmergedAdapters":
        tensors = {name: results.cache.load_verified_tensor(blob) for name, blob in body["tensors"].items()}
        base, shape = body["adapters"]["base"], AdapterShape(**body["adapters"]["shape"])
        restored = cls(results.base_program(base), base, shape, tensors)
        assert_adapters_fit_program(restored.program, shape, tensors)
        restored.program.notes = list(body["notes"].get("program", ()))
        return restored

    def with_base(self, key: str) -> "UnmergedAdapters":
        return replace(self, base=key) if self.base is None else self

    @contextmanager
    def with_adapters_applied(self) -> Iterator[None]:
        with (
            with_adapters(self.program.model, self.paths, self.shape, init_seed=0, zeros="fill") as adapters,
            torch.no_grad(),
        ):
            adapters.load(self.tensors)
            for layer in adapters.layers.values():
                layer.eval()  # new modules would drop some of what they are given
            yield

    def save_as_peft(self, folder: Path, base_model_name: str) -> None:
        """Write peft's own files; `base_model_name` is what they call the model beneath."""
        from peft import LoraConfig
        from safetensors.torch import save_file
        from transformers.pytorch_utils import Conv1D

        model = self.program.model
        transposed = any(isinstance(model.get_submodule(path), Conv1D) for path in self.paths)
        shape = self.shape
        ranks = {path: len(self.tensors[f"{path}.lora_A"]) for path in self.paths}
        lower = {path: rank for path, rank in ranks.items() if rank != shape.rank}
        # peft divides alpha by the module's own rank; all are to be scaled by alpha / shape.rank.
        alphas = {path: shape.alpha * rank / shape.rank for path, rank in lower.items()}
        config = LoraConfig(
            rank_pattern=lower,
            alpha_pattern=alphas,
            r=shape.rank,
            lora_alpha=shape.alpha,  # type: ignore[arg-type]  # a number that it divides, whatever the annotation says
            lora_dropout=shape.dropout,
            bias="none",
            target_modules=list(self.paths),
            base_model_name_or_path=base_model_name,
            inference_mode=True,
            fan_in_fan_out=transposed,
            task_type="CAUSAL_LM" if pretrained(model).can_generate() else None,
        )
        folder.mkdir()
        config.save_pretrained(str(folder))
        save_file(
            {f"base_model.model.{name}.weight": tensor.contiguous() for name, tensor in self.tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
