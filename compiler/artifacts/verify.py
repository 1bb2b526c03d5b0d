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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...dsl.syntax.diagnostics import Fault, Reject
from ..core.events import announce, tick
from ..core.memory import is_large
from ..ir.capture.first_calls import stock_fails
from ..ir.capture.sample import sample
from ..ir.layers.fast_mixers import as_library
from ..models.rows.forward import LOOK, not_a_number
from ..models.rows.inputs import has_two_sides
from ..models.rows.packed_inputs import SAMPLES, bands_of, frames_of, sees_and_reads
from ..plugin.interfaces import Form
from . import fork_server
from .manifest import Check
from .verify_child import GENERATION, GIVEN, OPENED, STEPS, TEXT, continues, generate, inputs_for, probe

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

# How far logits may be off, as a share of the largest one, by dtype.
SAME = {torch.float32: 1e-5}  # equal shapes give equal sums; BLAS may still choose by memory alignment
PADDED = {torch.float32: 1e-4}  # zeros change how sums are blocked, hence their rounding
COARSEST = 0.8  # of root mean squares, that a form may be off because the model itself is in bfloat16
_HALF = {"same": 2**-6, "padded": 2**-4}  # bfloat16 rounds at 2**-8, and over some layers
SECONDS = 1800
_CACHES = {"cache", "past_key_values"}  # what forwards call the keys and values of tokens before


def verify(
    artifact: Path,
    model: nn.Module,
    forms: Iterable[Form],
    *,
    seed: int = 0,
    seconds: float = SECONDS,
    text: torch.Tensor | None = None,
    told: Callable[[Form, torch.Tensor], None] = lambda form, logits: None,
) -> tuple[Check, ...]:
    """Every form that the folder holds, each in a process of its own; the folder may be a draft.

    text     rows of tokens whose logits `told` hears of each form; they are not compared
    return   one check per form and kind of output
    Rejects where one differs by more than its tolerance, or the process dies.
    """
    inputs = inputs_of(model, seed)
    there = [form for form in forms if (artifact / form.folder).is_dir()]
    said: dict[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}
    with announce("logits and tokens of the model in memory"):
        for steps in {form.steps for form in there}:
            said[steps] = _in_memory(model, inputs, steps)
    checks: list[Check] = []
    for number, form in enumerate(there, 1):
        with announce(f"{form.folder} in a fresh process, {number} of {len(there)}"):
            expected, plain = said[form.steps]
            given = inputs if text is None else {**inputs, TEXT: text}
            found = reopen(artifact / form.folder, form.opens, given, attention_of(model), seconds, form.steps)
            if text is not None:
                told(form, found.pop(TEXT))
            wanted = plain if form.opens == "plain" else expected
            rounded = form.rounds(model) if form.rounds else None
            routes = rounded is not None and form.routes(artifact / form.folder)
            held = partial(compare, expected=wanted, found=found, dtype=next(model.parameters()).dtype, routes=routes)
            now = held(form, rounded=rounded)
            if rounded is not None and not routes and not all(check.holds for check in now):
                own = own_rounding(model, inputs, form.steps, wanted)
                hard = replace(form, reason=f"torch's own bfloat16 is off by {own:.2g} of root mean squares")
                now = held(hard, rounded=min(COARSEST, rounded + 2 * own)) if own else now
            checks += now
    wrong = [check for check in checks if not check.holds]
    if wrong:
        raise Reject(*(_differs(check) for check in wrong))
    return tuple(checks)


def _in_memory(
    model: nn.Module, inputs: dict[str, torch.Tensor], steps: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the model computes, and what it does without kernels of ours: transformers alone runs none."""
    try:
        expected = probe(model, inputs, steps)
    except Reject:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise Reject(stock_fails(model, "answers or writes", error)) from error
    with as_library(model) as differs:
        plain = probe(model, inputs, steps) if differs else expected
    if not all(t.isfinite().all() for t in expected.values() if t.is_floating_point()):
        raise Reject(not_a_number("the result computes NaN or infinity for ordinary tokens", help=LOOK))
    return expected, plain


def own_rounding(
    model: nn.Module, inputs: dict[str, torch.Tensor], steps: int, wanted: Mapping[str, torch.Tensor]
) -> float:
    """How far the model in torch's bfloat16 is from float32, as a share of root mean squares: numbers that no rounding
    keeps are no fault of a form that rounds. `MOST` of the tokens count, as a few may meet other experts. 0 where it
    does not run in the other type, or is large."""
    other = torch.float32 if next(model.parameters()).dtype == torch.bfloat16 else torch.bfloat16
    if is_large(sum(p.numel() for p in model.parameters()) * other.itemsize):
        return 0.0
    try:
        found = probe(copy.deepcopy(model).to(other), inputs, steps)
    except (RuntimeError, TypeError, ValueError):
        return 0.0
    logits = (n for n, t in wanted.items() if t.is_floating_point() and not n.startswith(GENERATION) and n in found)
    shares = [
        _of_most(found[n].float() - wanted[n], wanted[n], None) / _spread(wanted[n])
        for n in logits
        if _spread(wanted[n])
    ]
    return max((s for s in shares if math.isfinite(s)), default=0.0)


def inputs_of(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Fixed inputs for any model: what its config asks for, or what it takes under names of its own."""
    numbers = getattr(model, "main_input_name", "") in SAMPLES or frames_of(model) or bands_of(model)
    if not isinstance(model, PreTrainedModel) or numbers or sees_and_reads(model):
        return {f"{GIVEN}{name}": x.contiguous() for name, x in sample(model).items()}
    images = model.main_input_name == "pixel_values"
    # A source is filled up behind its text, as encoders' rows are: many number positions by the place in a row.
    given = inputs_for(model.config, seed, images, behind=has_two_sides(model) or not model.can_generate())
    return given if _decodes_together(model, given) else {name: x[-1:].clone() for name, x in given.items()}


def _decodes_together(model: PreTrainedModel, given: Mapping[str, torch.Tensor]) -> bool:
    """Whether rows that a model continues together come out as each does alone. transformers' RWKV mixes them up: what
    it says of several has no sense, and nothing is held against it. Those that cache keys and values are not asked."""
    known = inspect.signature(model.forward).parameters
    if "mask" not in given or has_two_sides(model) or not continues(model) or _CACHES & known.keys():
        return True
    ids = given["ids"]
    together, *alone = (
        torch.cat(generate(model, rows, torch.ones_like(rows), 2).logits, 1).float() for rows in (ids, *ids.split(1))
    )
    off = float((together - torch.cat(alone)).abs().max())
    return off <= _HALF["padded"] * max(1.0, float(together.abs().max()))


def attention_of(model: Any) -> str:
    """Which attention a model runs with; as JSON by the names of its parts where one of them takes another."""
    found = _attentions(getattr(model, "config", None))
    return found if isinstance(found, str) else json.dumps(found)


def _attentions(config: Any) -> str | dict[str, Any]:
    own = getattr(config, "_attn_implementation", None) or ""
    held = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    parts = {name: _attentions(part) or own for name, part in held.items() if part is not None}
    return {"": own, **parts} if any(said != own for said in parts.values()) else own


def reopen(
    folder: Path,
    how: str,
    inputs: Mapping[str, torch.Tensor],
    attention: str,
    seconds: float = SECONDS,
    steps: int = STEPS,
) -> dict[str, torch.Tensor]:
    """What a fresh process computes from a folder. `how` is a Form's `opens`."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="effc-verify-") as scratch:
        given, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file(dict(inputs), given)
        threads = str(torch.get_num_threads())
        try:
            done = fork_server.run(
                [how, str(folder), str(given), str(outputs), attention, threads, str(steps)],
                _environment(),
                seconds,
                lambda began: tick(*parts(began, outputs)),
            )
        except subprocess.TimeoutExpired as error:
            raise Reject(reload_starved(f"reopening {folder.name}/ took more than {seconds:g} s")) from error
        if done.returncode or not outputs.is_file():
            raise Reject(_died(folder, done)) from Ended(done.stderr)
        return {name: tensor.clone() for name, tensor in load_file(outputs).items()}


def parts(began: bool, outputs: Path) -> tuple[str, str]:
    """What a fresh process does now, and how far it is."""
    done = began + Path(str(outputs) + OPENED).exists()
    return ("starting", "opening the folder", "computing logits and tokens")[done], f"part {done + 1} of 3"


class Ended(Exception):
    """What a fresh process wrote before it ended, which `--debug` shows."""


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def _died(folder: Path, done: fork_server.Done):
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = lines[-1].rstrip(".") if lines else "it said nothing"
    if done.returncode < 0:
        return reload_starved(
            f"reopening {folder.name}/ was ended by signal {-done.returncode}",
            help="it holds a second copy of the weights: free memory",
        )
    return reload_died(f"{folder.name}/ does not load in a fresh process: {said}", help="--debug shows where it ended")


def compare(
    form: Form,
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    rounded: float | None = None,
    *,
    routes: bool = False,
) -> list[Check]:
    """One check per output. Tokens count as different only where the two best logits are not a near tie.

    rounded   the share of root mean squares for a form that rounds
    routes    it chooses experts, which a token with a nearly undecided router chooses otherwise once numbers are
              rounded: then `MOST` of the tokens are compared, and where such a token parts a generation is not
    """
    share = (PADDED if form.padded else SAME).get(dtype, _HALF["padded" if form.padded else "same"])
    reason = "zeros change the order of sums" if form.padded else "equal shapes; memory alignment may round sums"
    reason = form.reason or reason
    checks = []
    for name, want in expected.items():
        if name.startswith(GENERATION) and not form.generates:
            continue
        got = found.get(name)
        what = f"{form.folder}, fresh process: {name}"
        if got is None:
            checks.append(Check(what, math.inf, 0.0, "a fresh process gave none"))
        elif got.shape != want.shape:
            shapes = f"they are {list(got.shape)} in a fresh process, and {list(want.shape)} here"
            checks.append(Check(what, math.inf, 0.0, shapes))
        elif want.is_floating_point():
            ends = _ends(name, expected, found)
            until = None if ends is None else int(ends.min())
            if rounded is None:
                worst, limit = float((got - want)[:, :until].abs().max()), share * max(1.0, float(want.abs().max()))
            elif routes:
                worst, limit = _of_most(got - want, want, ends), rounded * _spread(want)
            else:
                worst, limit = _spread((got - want)[:, :until]), rounded * _spread(want)
            checks.append(Check(what, worst, limit, reason))
        else:
            gap = _token_gap(name, expected, found, rounded if routes else None)
            most = share * _largest(expected) if rounded is None else _FAR * rounded * _widest(expected)
            checks.append(Check(what, gap, 2 * most, _TIES))
    return checks


def _spread(logits: torch.Tensor) -> float:
    """Root mean square of logits less the mean of each row, which no token feels."""
    return float((logits - logits.mean(-1, keepdim=True)).double().square().mean().sqrt())


def _spreads(logits: torch.Tensor) -> torch.Tensor:
    """The same of each token alone."""
    return (logits - logits.mean(-1, keepdim=True)).double().square().mean(-1).sqrt()


def _of_most(off: torch.Tensor, want: torch.Tensor, ends: torch.Tensor | None) -> float:
    """What `MOST` of the tokens are off by at most, of those that neither are padding nor follow a parting."""
    counted = (want != 0).any(-1)
    if ends is not None:
        counted &= torch.arange(want.shape[1]) < ends[:, None]
    return float(_spreads(off)[counted].quantile(MOST, interpolation="higher"))


def _widest(expected: Mapping[str, torch.Tensor]) -> float:
    return max(_spread(t) for t in expected.values() if t.is_floating_point())


# Of the tokens of an output. A token that met another expert takes those after it in its row along, so it cannot be
# nearly all; a fault that strikes the padded row alone, two in five of the tokens, is refused.
MOST = 0.625
_FAR = 4  # root mean squares: one number in some ten thousands is further off
_TIES = "distance of the two best logits where tokens first part; 0 where all are equal"


def _ends(name: str, expected, found) -> torch.Tensor | None:
    """How many steps of each row of a generation can be compared: up to and with its first token that differs."""
    steps = expected[name].shape[1] - 1
    tokens = name.replace(f"logits of prefill and {steps} decode steps", "greedy tokens")
    if tokens == name or tokens not in found:
        return None
    odd = (expected[tokens] != found[tokens]).long()
    return torch.where(odd.any(1), odd.argmax(1) + 1, steps + 1)


def _token_gap(name: str, expected, found, rounded: float | None) -> float:
    """How far apart the best logits are where rows part; `rounded` leaves out tokens that are further off."""
    steps = expected[name].shape[1]
    of = name.replace("greedy tokens", f"logits of prefill and {steps - 1} decode steps")
    want, gap = expected[of], 0.0
    ends = _ends(of, expected, found)
    assert ends is not None, f"no tokens beside {of}"
    for row, end in enumerate(ends):
        last = int(end) - 1
        if expected[name][row, last] == found[name][row, last]:
            continue
        if rounded is None or _spread((found[of] - want)[row, last]) <= rounded * _spread(want):
            best = want[row, last].topk(2).values
            gap = max(gap, float(best[0] - best[1]))
    return gap


def _largest(expected: Mapping[str, torch.Tensor]) -> float:
    return max([1.0, *(float(t.abs().max()) for t in expected.values() if t.is_floating_point())])


def _differs(check: Check):
    far = f"{check.what} differ by {check.worst:.3g}, allowed is {check.tolerance:.3g}"
    return reload_differs(
        f"{check.what}: {check.reason}" if math.isinf(check.worst) else far,
        help="this artifact was not put in place; report this with the recipe",
    )
