"""Reopen what was written in a fresh process and compare what it computes with the model in memory.

The other process holds the second copy of the weights, mapped from the files just written; this one holds no
more than before, beside logits of a few tokens.
"""

import copy
import inspect
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ..core.events import announcing_stage, tick
from ..core.memory import is_too_large_to_copy
from ..ir.capture.failed_forward import model_failure_diagnostic
from ..ir.capture.sample import sample_inputs
from ..ir.layers.fast_mixers import without_mixer_kernels
from ..models.rows.forward import REMEDY, not_a_number
from ..models.rows.inputs import is_encoder_decoder, vocabulary_size
from ..models.rows.packed_inputs import (
    SAMPLES,
    frames_per_video,
    is_media_encoder_decoder,
    main_input_name,
    media_shape,
    sound_shape,
    token_input_name,
)
from ..plugin.target import Form
from . import fork_server
from .load import load
from .manifest import Check
from .output_comparison import HALF, compare_outputs, logit_rms, relative_error_quantile
from .verify_child import (
    GENERATION,
    INPUT_PREFIX,
    LENGTH,
    OPENED,
    ROWS,
    STEPS,
    TEXT,
    can_continue_ids,
    generate_greedy,
    inputs_for_config,
    probe_model,
)

reload_differs = Fault(
    "reload-differs",
    "An artifact was written, but a fresh process that loaded it computed something else.\n\n"
    "The artifact was not put in place. This is a mistake of effc or of a pass: report it with the recipe.",
    exit="failure",
)
reload_died = Fault(
    "reload-died", "The process that reopened an artifact ended before it computed anything.", exit="failure"
)
reload_starved = Fault(
    "reload-starved", "The process that reopened an artifact was killed or took too long.", exit="resources"
)

COARSEST = 0.8  # of root mean squares, that a form may be off because the model itself is in bfloat16
SECONDS = 1800
_OPENERS = Path(__file__).with_name("openers")
_CACHES = {"cache", "past_key_values"}  # what forwards call the keys and values of tokens before


def verify_forms(
    artifact: Path,
    model: nn.Module,
    forms: Iterable[Form],
    *,
    seed: int = 0,
    timeout_s: float = SECONDS,
    text_ids: torch.Tensor | None = None,
    on_text_logits: Callable[[Form, torch.Tensor], None] = lambda form, logits: None,
) -> tuple[Check, ...]:
    """Compare every form in the folder with the model, each in a process of its own; the folder may be a draft.

    text_ids   rows of tokens whose logits `on_text_logits` hears of each form; they are not compared
    return     one check per form and kind of output
    Rejects where one differs by more than its tolerance, or the process dies.
    """
    inputs = make_probe_inputs(model, seed)
    present = [form for form in forms if (artifact / form.folder).is_dir()]
    by_steps: dict[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}
    with announcing_stage("logits and tokens of the model in memory"):
        for steps in {form.steps for form in present if form.as_stored is None}:
            by_steps[steps] = _outputs_of_model_in_memory(model, inputs, steps)
    checks: list[Check] = []
    for number, form in enumerate(present, 1):
        folder, opener = artifact / form.folder, opener_script_path(form)
        label = f"{form.folder} in a fresh process, {number} of {len(present)}"
        with announcing_stage(label), form.as_stored(model, folder) if form.as_stored else nullcontext():
            expected, plain = (
                _outputs_of_model_in_memory(model, inputs, form.steps) if form.as_stored else by_steps[form.steps]
            )
            probe_inputs = inputs if text_ids is None else {**inputs, TEXT: text_ids}
            actual = probe_in_fresh_process(
                folder, opener, probe_inputs, attention_name_or_json(model), timeout_s, form.steps
            )
            if text_ids is not None:
                on_text_logits(form, actual.pop(TEXT))
            reference = plain if form.opens == "plain" else expected
            if form.loses:
                checks += _lossy_checks(form, folder, inputs, reference, actual)
                continue
            rounded = form.rounds(model) if form.rounds else None
            routes = rounded is not None and form.routes(folder)
            compare_form = partial(
                compare_outputs,
                expected=reference,
                actual=actual,
                dtype=next(model.parameters()).dtype,
                has_routed_experts=routes,
            )
            form_checks = compare_form(form, rounding=rounded)
            if rounded is not None and not routes and not all(check.holds for check in form_checks):
                rounding = bfloat16_rounding_error(model, inputs, form.steps, reference)
                hard = replace(form, reason=f"torch's own bfloat16 is off by {rounding:.2g} of root mean squares")
                if rounding:
                    form_checks = compare_form(hard, rounding=min(COARSEST, rounded + 2 * rounding))
            checks += form_checks
    failed = [check for check in checks if not check.holds]
    if failed:
        raise Reject(*(_reload_differs_diagnostic(check) for check in failed))
    return tuple(checks)


def _lossy_checks(
    form: Form,
    folder: Path,
    inputs: dict[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    actual: Mapping[str, torch.Tensor],
) -> list[Check]:
    """Comparison with the folder as this process opens it; the loss against the model in memory is told beside."""
    local = probe_model(load(folder, check="size"), inputs, form.steps)
    largest = max(
        logit_rms(local[name] - logits) / max(logit_rms(logits), 1e-9)
        for name, logits in reference.items()
        if logits.is_floating_point() and not name.startswith(GENERATION)
    )
    told = replace(form, reason=f"{form.reason}; {form.loses} itself is off by {largest:.2g} of root mean squares")
    return compare_outputs(told, expected=local, actual=actual, dtype=torch.float32)


def _outputs_of_model_in_memory(
    model: nn.Module, inputs: dict[str, torch.Tensor], steps: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of the model in memory, with and without our kernels: transformers alone runs none."""
    try:
        expected = probe_model(model, inputs, steps)
    except Reject:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise model_failure_diagnostic(model, "answers or writes", error).rejection() from error
    with without_mixer_kernels(model) as differs:
        plain = probe_model(model, inputs, steps) if differs else expected
    if not all(t.isfinite().all() for t in expected.values() if t.is_floating_point()):
        raise not_a_number("the result computes NaN or infinity for ordinary tokens", help=REMEDY).rejection()
    return expected, plain


def bfloat16_rounding_error(
    model: nn.Module, inputs: dict[str, torch.Tensor], steps: int, reference: Mapping[str, torch.Tensor]
) -> float:
    """Error of the model in torch's bfloat16 against float32, as a share of root mean squares: numbers that no rounding
    keeps are no fault of a form that rounds. `MOST` of the tokens count, as a few may meet other experts. 0 where it
    does not run in the other type, or is large."""
    other = torch.float32 if next(model.parameters()).dtype == torch.bfloat16 else torch.bfloat16
    if is_too_large_to_copy(sum(p.numel() for p in model.parameters()) * other.itemsize):
        return 0.0
    try:
        rounded_outputs = probe_model(copy.deepcopy(model).to(other), inputs, steps)
    except (RuntimeError, TypeError, ValueError):
        return 0.0
    logits = (
        n
        for n, t in reference.items()
        if t.is_floating_point() and not n.startswith(GENERATION) and n in rounded_outputs
    )
    shares = [
        relative_error_quantile(rounded_outputs[n].float() - reference[n], reference[n], None) / logit_rms(reference[n])
        for n in logits
        if logit_rms(reference[n])
    ]
    return max((s for s in shares if math.isfinite(s)), default=0.0)


def make_probe_inputs(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Fixed inputs for any model: what its config asks for, or what it takes under names of its own."""
    if is_media_encoder_decoder(model):
        generator = torch.Generator().manual_seed(seed)
        media = torch.randn(ROWS, *media_shape(model), generator=generator)
        words = vocabulary_size(model, decoder=True) or 1
        return {"media": media, "ids": torch.randint(0, words, (ROWS, LENGTH), generator=generator)}
    numbers = main_input_name(model) in SAMPLES or frames_per_video(model) or sound_shape(model)
    if not isinstance(model, PreTrainedModel) or numbers or token_input_name(model):
        return {f"{INPUT_PREFIX}{name}": x.contiguous() for name, x in sample_inputs(model).items()}
    images = main_input_name(model) == "pixel_values"
    # A source is filled up behind its text, as encoders' rows are: many number positions by the place in a row.
    pad_right = is_encoder_decoder(model) or not model.can_generate()
    inputs = inputs_for_config(model.config, seed, images, pad_right=pad_right)
    return inputs if _batch_matches_single_rows(model, inputs) else {name: x[-1:].clone() for name, x in inputs.items()}


def _batch_matches_single_rows(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether rows that a model continues together come out as each does alone. transformers' RWKV mixes them up: what
    it says of several has no sense, and nothing is held against it. Those that cache keys and values are not asked."""
    known = inspect.signature(model.forward).parameters
    if "mask" not in inputs or is_encoder_decoder(model) or not can_continue_ids(model) or _CACHES & known.keys():
        return True
    ids = inputs["ids"]
    batched, *single = (
        torch.cat(generate_greedy(model, rows, torch.ones_like(rows), 2).logits, 1).float()
        for rows in (ids, *ids.split(1))
    )
    off = float((batched - torch.cat(single)).abs().max())
    return off <= HALF["padded"] * max(1.0, float(batched.abs().max()))


def attention_name_or_json(model: Any) -> str:
    """Attention implementation of a model; as JSON by the names of its parts where one of them takes another."""
    implementations = _attention_implementation(getattr(model, "config", None))
    return implementations if isinstance(implementations, str) else json.dumps(implementations)


def _attention_implementation(config: Any) -> str | dict[str, Any]:
    implementation = getattr(config, "_attn_implementation", None) or ""
    sub_configs = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    parts = {
        name: _attention_implementation(part) or implementation
        for name, part in sub_configs.items()
        if part is not None
    }
    return (
        {"": implementation, **parts}
        if any(part_implementation != implementation for part_implementation in parts.values())
        else implementation
    )


def opener_script_path(form: Form) -> Path:
    """Python file that opens a form: one of effc's, or the target's own."""
    file = Path(form.opens) if form.opens.endswith(".py") else _OPENERS / f"{form.opens}.py"
    assert file.is_file(), f"{form.folder} is opened by {form.opens}, and there is no {file}"
    return file


def probe_in_fresh_process(
    folder: Path,
    opener: Path,
    inputs: Mapping[str, torch.Tensor],
    attention: str,
    timeout_s: float = SECONDS,
    steps: int = STEPS,
) -> dict[str, torch.Tensor]:
    """Outputs that a fresh process computes from a folder, which the Python file `opener` opens."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="effc-verify-") as scratch:
        inputs_file, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file(dict(inputs), inputs_file)
        threads = str(torch.get_num_threads())
        try:
            done = fork_server.run_verify_child(
                [str(opener), str(folder), str(inputs_file), str(outputs), attention, threads, str(steps)],
                _offline_subprocess_env(),
                timeout_s,
                lambda started: tick(*probe_stage_and_progress(started, outputs)),
            )
        except subprocess.TimeoutExpired as error:
            raise reload_starved(f"reopening {folder.name}/ took more than {timeout_s:g} s").rejection() from error
        if done.returncode or not outputs.is_file():
            raise _child_failure_diagnostic(folder, done).rejection() from ChildFailed(done.stderr)
        return {name: tensor.clone() for name, tensor in load_file(outputs).items()}


def probe_stage_and_progress(has_started: bool, outputs_path: Path) -> tuple[str, str]:
    """Stage and progress of a fresh process."""
    done = has_started + Path(str(outputs_path) + OPENED).exists()
    return ("starting", "opening the folder", "computing logits and tokens")[done], f"part {done + 1} of 3"


class ChildFailed(Exception):
    """Output of a failed fresh process, which `--debug` shows."""


def _offline_subprocess_env() -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def _child_failure_diagnostic(folder: Path, job_result: fork_server.JobResult) -> Diagnostic:
    lines = [line for line in job_result.stderr.splitlines() if line.strip()]
    last_line = lines[-1].rstrip(".") if lines else "it said nothing"
    if job_result.returncode < 0:
        return reload_starved(
            f"reopening {folder.name}/ was ended by signal {-job_result.returncode}",
            help="it holds a second copy of the weights: free memory",
        )
    return reload_died(
        f"{folder.name}/ does not load in a fresh process: {last_line}", help="--debug shows where it ended"
    )


def _reload_differs_diagnostic(check: Check) -> Diagnostic:
    far = f"{check.what} differ by {check.worst:.3g}, allowed is {check.tolerance:.3g}"
    return reload_differs(
        f"{check.what}: {check.reason}" if math.isinf(check.worst) else far,
        help="this artifact was not put in place; report this with the recipe",
    )
