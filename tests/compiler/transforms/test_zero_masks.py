"""Zeros of a sparse model in the training loop of its user: a Trainer's, Lightning's."""

import importlib.util
import subprocess
import sys

import effc
import pytest
import torch
from effc.callbacks import KeepZeros
from effc.compiler.transforms.training.zero_masks import ZeroMasks
from effc.dsl.syntax.diagnostics import Reject
from transformers import Trainer, TrainingArguments

from tests import tiny

LIGHTNING = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)]
needs_lightning = pytest.mark.skipif(not LIGHTNING, reason="Lightning is not installed")
IDS = torch.randint(3, 128, (32, 12), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def sparse_model(seed: int = 3) -> torch.nn.Module:
    """Half of each projection is zero; the other half is not."""
    model = tiny.model("llama")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.mul_(torch.rand(p.shape, generator=generator) < 0.5)
    return model


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if "proj" in name}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def arguments(folder, **others) -> TrainingArguments:
    settings = {"max_steps": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "per_device_train_batch_size": 4}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **(settings | others))


def trained(model, folder, callbacks, resume=None, optimizers=(None, None), **others):
    trainer = Trainer(
        model, arguments(folder, **others), train_dataset=ROWS, callbacks=callbacks, optimizers=optimizers
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("others", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"optim": "adafactor"}])
def test_zeros_stay_zero_in_a_trainer_while_their_neighbours_are_trained(tmp_path, others):
    model = sparse_model()
    before, weights = zeros(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    trained(model, tmp_path, [KeepZeros()], **others)
    assert equal(before, zeros(model))
    moved = {name: (p.detach() != weights[name]) for name, p in model.named_parameters() if name in before}
    assert all(m[~before[name]].float().mean() > 0.9 for name, m in moved.items())


def test_a_trainer_without_the_callback_fills_them(tmp_path):
    model = sparse_model()
    before = zeros(model)
    trained(model, tmp_path, [])
    assert not equal(before, zeros(model))


def test_an_optimizer_that_moves_weights_without_a_gradient_leaves_zeros_zero(tmp_path):
    """Muon mixes the rows of a matrix, so that masked gradients are not enough."""
    model = sparse_model()
    before = zeros(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name in before)
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trained(model, tmp_path, [KeepZeros()], optimizers=(optimizer, None))
    assert equal(before, zeros(model))


@pytest.mark.slow
def test_training_that_resumes_gives_what_one_without_a_break_gives(tmp_path):
    whole, broken, resumed = sparse_model(), sparse_model(), sparse_model(seed=9)
    before = zeros(whole)
    steps = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "seed": 1}
    trained(whole, tmp_path / "whole", [KeepZeros()], **steps)
    trained(broken, tmp_path / "broken", [KeepZeros()], **(steps | {"max_steps": 2}))
    trained(resumed, tmp_path / "broken", [KeepZeros()], resume=str(tmp_path / "broken" / "checkpoint-2"), **steps)
    assert equal(before, zeros(resumed))
    assert equal(whole.state_dict(), resumed.state_dict())


def test_the_norm_that_gradients_are_clipped_by_counts_trained_weights_alone():
    model = sparse_model()
    masks = ZeroMasks()
    masks.record_zeros_and_mask_gradients(model)
    model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
    assert all((p.grad[p.detach() == 0] == 0).all() for name, p in model.named_parameters() if "proj" in name)
    masks.remove_hooks()
    model.zero_grad()
    model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
    assert any((p.grad[p.detach() == 0] != 0).any() for name, p in model.named_parameters() if "proj" in name)


@pytest.mark.parametrize("case", ["dense", "frozen", "adapters"])
def test_a_model_that_trains_no_sparse_weight_is_refused(tmp_path, case):
    model = tiny.model("llama") if case == "dense" else sparse_model()
    if case == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_("proj" not in name)
    if case == "adapters":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(Reject, match="no-sparse-weight"):
        trained(model, tmp_path, [KeepZeros()])


@pytest.mark.slow
def test_a_model_healed_by_its_user_is_measured_and_emitted_by_optimize_without_steps(tmp_path):
    options = {"cache_dir": tmp_path / "cache", "threads": 1}
    slim = effc.optimize(tiny.model("llama"), effc.sparsify.magnitude(sparsity="50% of weights"), data=IDS, **options)
    model = slim.model
    before = zeros(model)
    trained(model, tmp_path / "trainer", [KeepZeros()])
    healed = effc.optimize(model, data=IDS, expect="perplexity <= 999", **options)
    assert equal(before, zeros(healed.model)) and not healed.missed
    assert healed.measures["perplexity(heldout)"].compiled != slim.measures["perplexity(heldout)"].compiled
    assert healed.emit(effc.targets.hf("healed"), tmp_path).path.is_dir()


@needs_lightning
@pytest.mark.slow
def test_zeros_stay_zero_in_lightning_and_behind_its_checkpoint(tmp_path):
    lightning = importlib.import_module("lightning.pytorch" if LIGHTNING[0] == "lightning" else "pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self, seed: int = 3):
            super().__init__()
            self.model = sparse_model(seed)

        def training_step(self, batch, index):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    def fit(module, steps, resume=None):
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            default_root_dir=tmp_path,
            callbacks=[effc.callbacks.LightningKeepZeros()],
        )
        trainer.fit(module, torch.utils.data.DataLoader(IDS, batch_size=4), ckpt_path=resume)
        return trainer

    module, resumed = Module(), Module(seed=9)
    before, weight = zeros(module), module.model.lm_head.weight.detach().clone()
    fit(module, 2).save_checkpoint(tmp_path / "two.ckpt")
    assert equal(before, zeros(module)) and not torch.equal(weight, module.model.lm_head.weight)
    fit(resumed, 4, resume=tmp_path / "two.ckpt")
    assert equal(before, zeros(resumed))
    with pytest.raises(Reject, match="no-sparse-weight"):
        fit(Module().requires_grad_(False), 1)


@pytest.mark.slow
def test_the_package_offers_callbacks_without_lightning():
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import effc\nfrom effc.callbacks import *\nassert KeepZeros is effc.callbacks.KeepZeros\n"
        "try: effc.callbacks.LightningKeepZeros\n"
        "except ImportError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install pytorch-lightning" in ran.stdout
