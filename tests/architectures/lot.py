"""Architectures by lot: model types of transformers that no row of the matrix names, through whole recipes.

    python -m tests.architectures.matrix --lot 40 --seed 1      draws 40, prints the share that goes through and why not
    python -m tests.architectures.matrix --types canine rwkv    those types, whether the matrix names them or not;
                                                                without names those of `ODD`

A type is drawn where transformers has a class of it for a task of `TASKS` and its config is no part of another's. Its
config is shrunk by names that configs share (`SIZES`); a type whose config does not shrink so is drawn again, and named.
Every model has a process and a time limit of its own: check, plan, compile, reload in a fresh process. A pass is asked for
10 % of the parameters, or for less where not so many can go, as `effc new` does.
"""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tests.architectures import table
from tests.architectures.generated import GENERATED
from tests.architectures.more import MORE
from tests.architectures.small_configs import small

TASKS = (  # of one class for each type, the first that there is
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
)
WORDS = ("prune.multi", "sparsify.wanda")
FIRST = 10  # % of parameters; then, by what refused them, those that a user would take next, as `effc new` does
OTHERS = {"out-of-reach": (7, 3, 1), "overshoots": (20, 40)}
SECONDS = 240  # of a processor that a model and its recipes may take; four times as long where others run beside it
ODD = (  # types that went wrong for somebody once
    *("clip", "siglip", "metaclip_2", "bart", "fsmt", "pegasus_x", "t5", "prophetnet", "efficientnet", "mobilenet_v1"),
    *("mobilenet_v2", "albert", "deepseek_v4", "big_bird", "voxtral", "convnextv2", "speecht5", "wav2vec2-bert"),
    *("videomae", "instructblip", "canine", "squeezebert", "moonshine", "rwkv", "idefics2", "shieldgemma2"),
    *("longformer", "jetmoe", "xmod", "cpmant", "clipseg", "inkling2", "inkling2_loop", "speech-encoder-decoder"),
)
NUMBERS = 12_000_000  # parameters of what still counts as tiny


@dataclass
class Drawn:
    """A type of the lot, its class, and of each pass a state ("green", "refused", "failed", "late") with the reason."""

    kind: str
    cls: str = ""
    cells: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def is_made(self) -> bool:
        return bool(self.cells)


def classes() -> dict[str, str]:
    """`every_class` without types that the matrix names."""
    named = {values[1] for values in (*GENERATED.values(), *MORE.values())} | set(table.ROWS)
    alike = {kind.replace("-", "_") for kind in named}
    return {kind: cls for kind, cls in every_class().items() if kind.replace("-", "_") not in alike}


def every_class() -> dict[str, str]:
    """Class names by model type, of the first task that has one."""
    found: dict[str, str] = {}
    for task in TASKS:
        for kind, cls in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            found.setdefault(kind, cls if isinstance(cls, str) else cls[0])
    return {kind: cls for kind, cls in sorted(found.items()) if kind in CONFIG_MAPPING_NAMES and not _is_part(kind)}


def _is_part(kind: str) -> bool:
    """Whether a config stands inside of another one, or cannot be read here."""
    try:
        return bool(CONFIG_MAPPING[kind].base_config_key)
    except Exception:  # a config of a package that is not installed
        return True


def made(kind: str, cls: str) -> torch.nn.Module | None:
    """A small model of a type with random weights, of the first config whose forward runs, else of the first that is
    tiny; None where there is none."""
    maker, first = getattr(transformers, cls), None
    for config in small(kind, cls):
        try:
            with torch.device("meta"):
                blank = maker(config)
            if sum(p.numel() for p in blank.parameters()) > NUMBERS:
                continue
            model = table.randomized(lambda config=config: maker(config), spread=0.05)
        except Exception:  # any of hundreds of classes of others' code
            continue
        if _runs(model):
            return model
        first = model if first is None else first
    return first


def _runs(model: torch.nn.Module) -> bool:
    from effc.compiler.ir.capture.first_calls import record_first_calls
    from effc.compiler.ir.capture.sample import sample_inputs
    from effc.dsl.syntax.diagnostics import Reject

    try:
        record_first_calls(model, sample_inputs(model))
    except Reject:
        return False
    return True


# -- one model ------------------------------------------------------------------------------------------------


def tried(kind: str, cls: str, folder: Path) -> dict[str, list[str]]:
    """State and reason of each pass for a type, by whole recipes; nothing where it can't be made small."""
    model = made(kind, cls)
    if model is None:
        return {}
    model.save_pretrained(folder / "model")
    del model
    return {word: list(compiled(word, folder)) for word in WORDS}


def compiled(word: str, folder: Path) -> tuple[str, str]:
    """What comes of a recipe with one pass."""
    from effc.compiler.cli.verbs.new import NamedSource, choose_evaluation
    from effc.compiler.driver import api
    from effc.dsl.syntax.diagnostics import Reject

    path = folder / f"{word}.effspec"
    try:
        session = api.open_session(path, cache_dir=folder / "cache")
        call = NamedSource("hf", "./model").call(session)
        judge = choose_evaluation(session.resolve_model_origin(call), session.skeleton(call))
        shares = [FIRST]
        while shares:
            share = shares.pop(0)
            path.write_text(_recipe(word, judge.metric_on_rows("rows"), share), encoding="utf-8")
            faults = [d for d in api.check(path, cache_dir=folder / "cache").diagnostics if d.severity == "error"]
            if faults:
                raise Reject(*faults)
            try:
                api.plan(path, cache_dir=folder / "cache", threads=1)
                api.compile(path, folder / "out", cache_dir=folder / "cache", threads=1)
                break
            except Reject as refused:
                if share == FIRST:
                    shares = list(OTHERS.get(refused.diagnostics[0].slug, ()))
                if not shares:
                    raise
    except Reject as refused:
        return "refused", "; ".join(f"{d.slug}: {d.message} {d.note}".strip() for d in refused.diagnostics)
    except Exception as error:  # which is what is looked for
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return "green", ""


def _recipe(word: str, score: str, share: int) -> str:
    call = {
        "prune.multi": f"prune.multi(remove: {share}% of params, group: 8, score: {score})",
        "sparsify.wanda": "sparsify.wanda(sparsity: 50%, data: rows)",
    }[word]
    name = word.replace(".", "_")
    return f"""effspec 1
model base = hf("./model")
data rows = synthetic(count: 4, seed: 1)
pipeline {name}(base) {{ slim = {call} }}
emit {name} {{ hf("{name}") }}
"""


# -- the lot --------------------------------------------------------------------------------------------------


def drawn(number: int, seed: int) -> Iterator[Drawn]:
    """Types in the order of a lot, each tried in a process of its own, until `number` of them could be made small."""
    pool = classes()
    for kind in shuffled(pool, seed):
        if number == 0:
            break
        one = alone(kind, pool[kind])
        number -= one.is_made
        yield one


def shuffled(pool: Mapping[str, str], seed: int) -> list[str]:
    """Types in the order of a lot."""
    order = sorted(pool)
    random.Random(seed).shuffle(order)
    return order


def alone(kind: str, cls: str) -> Drawn:
    """A type, tried in a process of its own: a fork of one that has imported what all need."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, "effc.compiler.driver.api", "effc.compiler.cli.verbs.new"])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "cells.json"
        child = forks.Process(target=_write_cells, args=(kind, cls, Path(folder), result))
        child.start()
        child.join(4 * SECONDS)
        is_late = child.is_alive() or child.exitcode == -signal.SIGXCPU
        if child.is_alive():
            child.kill()
            child.join()
        if is_late:
            return Drawn(kind, cls, dict.fromkeys(WORDS, ("late", f"not done in {SECONDS} s")))
        if not result.is_file():
            return Drawn(kind, cls, dict.fromkeys(WORDS, ("failed", "its process died")))
        return Drawn(kind, cls, {word: tuple(cell) for word, cell in json.loads(result.read_text()).items()})


def _write_cells(kind: str, cls: str, folder: Path, result: Path) -> None:
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    torch.set_num_threads(1)
    result.write_text(json.dumps(tried(kind, cls, folder)), encoding="utf-8")


def run(number: int, seed: int) -> str:
    """Print every type and reason as it is tried; return the shares, printed as well."""
    print(f"{len(classes())} types; {number} by lot, seed {seed}", flush=True)
    text = summary([*_printed(drawn(number, seed))], f"By lot (seed {seed}")
    print(text)
    return text


def run_types(kinds: list[str]) -> str:
    """As `run`, of types by name; without names of `ODD`."""
    every = every_class()
    types = [*_printed(alone(kind, every[kind]) for kind in kinds or ODD)]
    text = summary(types, f"By name ({', '.join(kinds) or 'types that once went wrong for somebody'}")
    print(text)
    return text


def _printed(types: Iterable[Drawn]) -> Iterator[Drawn]:
    for one in types:
        cells = "; ".join(f"{word} {state} {why}".strip() for word, (state, why) in one.cells.items())
        print(f"{one.kind:24} {one.cls:40} {cells or 'not made small'}", flush=True)
        yield one


def summary(found: list[Drawn], start: str) -> str:
    """One sentence: of how many types each pass goes through, and what could not be made small."""
    of, left = [one for one in found if one.is_made], [one.kind for one in found if not one.is_made]
    both = sum(all(state == "green" for state, _ in one.cells.values()) for one in of)
    said = [f"{both} of {len(of)} types go through both recipes"]
    for word in WORDS:
        count = Counter(one.cells[word][0] for one in of)
        rest = ", ".join(f"{number} {state}" for state, number in sorted(count.items()) if state != "green")
        said.append(f"`{word}` {count['green']} of {len(of)}" + (f" ({rest})" if rest else ""))
    return (
        f"{start}; late: more than {SECONDS} s of a processor): {', '.join(said)}; "
        f"no tiny config could be built for: {', '.join(left) or 'none'}."
    )


def put_into(page: str, line: str) -> str:
    """A page with the sentence of a lot or of types by name at its end, in place of that of the same seed or names."""
    start = re.match(r"By lot \(seed \d+|By name", line)
    assert start is not None, f"a sentence of neither: {line}"
    rest = re.sub(rf"(?m)^{re.escape(start[0])}\b.*\n{{0,2}}", "", page).rstrip("\n")
    return f"{rest}\n\n{line}\n"
