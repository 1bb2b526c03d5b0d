"""Architectures by lot: model types of transformers that no row of the matrix names, through whole recipes.

    python -m tests.architectures.matrix --lot 40 --seed 1      draws 40, prints the share that goes through and why not

A type is drawn where transformers has a class of it for a task of `TASKS` and its config is no part of another's. Its
config is shrunk by names that configs share (`SIZES`); a type whose config does not shrink so is drawn again, and named.
Every model has a process and a time limit of its own: check, plan, compile, reload in a fresh process. A pass is asked for
10 % of the parameters, or for less where not so many can go, as `effc new` does.
"""

import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tests.architectures import table
from tests.architectures.generated import GENERATED
from tests.architectures.more import MORE

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
OTHERS = {"out-of-reach": (5, 2, 1), "overshoots": (20, 40)}
SECONDS = 240  # that a model and its recipes may take
NUMBERS = 12_000_000  # parameters of what still counts as tiny
_HEAD = r"head_dim|.*_head_dim|d_kv|attention_head_size"
_HIDDEN = r"(.*_)?hidden_size|d_model|n_embd|embed_dim|emb_dim|hidden_dim|embedding_size|projection_dim|dim|d_embed"
_HIDDEN += r"|adapter_(in_dim|out_dim|input_size)"
SIZES: tuple[tuple[str, Any], ...] = (  # names of configs -> what stands there in a small one; the first that matches
    (r"(.*_)?vocab_size.*|n_words", 128),
    (r"(pad|bos|eos|decoder_start|sep|cls|mask)_token_id", None),  # those of the small vocabulary follow
    (r".*token_(id|index)", 5),
    (r"max_(position_embeddings|target_positions|seq_len)|n_positions", 256),
    (r"max_source_positions", 64),
    (r".*(num|n)_.*layers?|(encoder|decoder|text|vision|qformer)_layers|n_layers?|num_layers|depth", 2),
    (r"num_hidden_layers", 2),
    (r"indexer_kv_heads", 1),
    (r".*(key_value|kv)_heads", 4),
    (r".*(attention_heads|num_heads|n_heads?)", 4),
    (r"num_filters", 4),  # doubled at each of several halvings
    (r"qk_head_dim", 32),  # of both its parts
    (_HEAD, 16),
    (_HIDDEN, 64),
    (r".*(intermediate_size|ffn_dim|ffn_size|d_ff|dim_ff|n_inner|dff)", 96),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|(.*_)?n_?groups", 1),
    (r"q_lora_rank", 24),
    (r"kv_lora_rank", 16),
    (r"image_size|input_size|img_size", 64),
    (r"patch_size", 16),
    (r"coordinate_size", 10),  # four of these and two of those are a hidden size
    (r"shape_size", 12),
    (r"mm_tokens_per_image", 4),  # a square of as many patches at most
)
UNSTATED = {
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5},
    "wav2vec2-conformer": {"vocab_size": 32},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 96}},
    "qwen4_exp": {
        "text_config": {
            **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
            **{"indexer_budget": 8, "indexer_compress_ratio": 2},
        }
    },
}  # what classes read and configs don't state
_WIDTH = ("hidden_size", "d_model", "embed_dim")  # of which other sizes of a config are multiples
_DEPTHS = ("depths", "num_block_repeats")
_SCALES = {"width_coefficient": 0.2, "depth_coefficient": 1.0}  # of EfficientNet's lists
_OF_LAYERS = re.compile(r".*(layer|index|indices|idx).*")  # lists of numbers of layers


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
    """Class names by model type, of the first task that has one; types that the matrix names are left out."""
    named = {values[1] for values in (*GENERATED.values(), *MORE.values())} | set(table.ROWS)
    found: dict[str, str] = {}
    for task in TASKS:
        for kind, cls in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            found.setdefault(kind, cls if isinstance(cls, str) else cls[0])
    alike = {kind.replace("-", "_") for kind in named}
    return {
        kind: cls
        for kind, cls in sorted(found.items())
        if kind in CONFIG_MAPPING_NAMES and kind.replace("-", "_") not in alike and not _is_part(kind)
    }


def _is_part(kind: str) -> bool:
    """Whether a config stands inside of another one, or cannot be read here."""
    try:
        return bool(CONFIG_MAPPING[kind].base_config_key)
    except Exception:  # a config of a package that is not installed
        return True


def small(kind: str, cls: str) -> Iterator[PretrainedConfig]:
    """Configs of a type for a class, from the smallest to those with fewer names changed."""
    shapes = ("image", "patch")
    variants = (
        ((), 1.0),
        ((), 1.5),
        (shapes, 1.0),
        (("head", "kv", *shapes), 1.0),
        (("head", "kv", "hidden", "dim", "patch"), 1.0),
    )
    for skipped, wider in variants:
        try:
            config = AutoConfig.for_model(kind, **UNSTATED.get(kind, {}))
            _shrink(config, skipped, wider)
            config = CONFIG_MAPPING[kind].from_dict(config.to_dict())
            yield config if isinstance(config, _config_class(cls)) else config.get_text_config()
        except Exception:  # anybody's checks of anybody's names
            continue


def _config_class(cls: str) -> type[PretrainedConfig]:
    """The config that a class takes: of its type, or of the part of it that reads texts."""
    return getattr(transformers, cls).config_class or PretrainedConfig


def _shrink(config: PretrainedConfig, skipped: tuple[str, ...], wider: float) -> None:
    """Write `SIZES` over the numbers of a config and of those inside of it, widths `wider` times as large: six divides
    96, which a sum of six tables of positions asks for."""
    layers, kinds = getattr(config, "num_hidden_layers", None), _kinds_of_layers(config)
    splits = _splits_heads(config)
    width = next((size for name in _WIDTH if isinstance(size := getattr(config, name, None), int)), 0)
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, skipped, wider)
        elif isinstance(value, list) and isinstance(layers, int) and len(value) == layers > 2 and name != "depths":
            entries = [entry for place, entry in enumerate(value) if entry not in value[:place]][:kinds]
            setattr(config, name, entries + [value[0]] * (kinds - len(entries)))
        elif isinstance(value, list) and _OF_LAYERS.fullmatch(name) and all(type(entry) is int for entry in value):
            setattr(config, name, [min(max(entry, -2), 1) for entry in value])  # of two layers
        elif type(value) is int and not any(part in name for part in skipped):
            setattr(config, name, kinds if name == "num_hidden_layers" else _small_number(name, value, width, wider))
        elif name == "rope_parameters" and isinstance(value, dict) and _reads_sections(config):
            rotated = int(getattr(config, "head_dim", 16) * (value.get("partial_rotary_factor") or 1)) // 2
            value["mrope_section"] = [rotated // 4, rotated // 4, rotated - 2 * (rotated // 4)]
        elif name in (*_DEPTHS, "hidden_sizes", "embed_dims") and isinstance(value, (list, tuple)):
            setattr(config, name, [1 if name in _DEPTHS else 32 * (place + 1) for place in range(len(value))])
        elif name in _SCALES and isinstance(value, float):
            setattr(config, name, _SCALES[name])
    if splits:
        config.head_dim = config.qk_rope_head_dim + _small_number("qk_nope_head_dim", 0, 0, wider)
    if "per_layer_config" in config.to_dict():
        config.per_layer_config = {}  # sizes of some layers, which are as small as those of the others


def _small_number(name: str, value: int, width: int, wider: float) -> int:
    """What stands in a small config in place of a number: by its name, else as many times the width as before."""
    if name == "num_feat_extract_layers":  # as many as its convolutions, which are a list
        return value
    multiple = int(value * 64 * wider) // width if width and value > width and value % width == 0 else value
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), multiple)
    size = int(size * wider) if size and re.fullmatch(f"{_HEAD}|{_HIDDEN}", name) else size
    return size if size is not None else min(value, 3)


def _splits_heads(config: PretrainedConfig) -> bool:
    """Whether a head is a part that is rotated and one that isn't: elsewhere its size is that of the rotated part."""
    plain = config.to_dict()
    return plain.get("head_dim", 0) > plain.get("qk_rope_head_dim", math.inf)


def _reads_sections(config: PretrainedConfig) -> bool:
    """Whether positions of a model are those of time, height and width, each in a section of the rotated numbers."""
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return True
    file = Path(sys.modules[type(config).__module__].__file__ or "")
    source = file.with_name(file.name.replace("configuration_", "modeling_"))
    is_text = not config.base_config_key or "text" in config.base_config_key
    return is_text and source.is_file() and "mrope_section" in source.read_text(encoding="utf-8")


def _kinds_of_layers(config: PretrainedConfig) -> int:
    """As many layers as there are kinds of them in a list with one for each; two at least."""
    layers = getattr(config, "num_hidden_layers", 0)
    lists = [value for value in vars(config).values() if isinstance(value, list) and len(value) == layers > 2]
    return max([2, *(len(set(value)) for value in lists if all(isinstance(entry, str) for entry in value))])


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
            path.write_text(_recipe(word, judge.metric, share), encoding="utf-8")
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


def _recipe(word: str, metric: str, share: int) -> str:
    call = {
        "prune.multi": f"prune.multi(remove: {share}% of params, group: 8, score: {metric}(rows))",
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
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
            return Drawn(kind, cls, dict.fromkeys(WORDS, ("late", f"not done in {SECONDS} s")))
        if not result.is_file():
            return Drawn(kind, cls, dict.fromkeys(WORDS, ("failed", "its process died")))
        return Drawn(kind, cls, {word: tuple(cell) for word, cell in json.loads(result.read_text()).items()})


def _write_cells(kind: str, cls: str, folder: Path, result: Path) -> None:
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    torch.set_num_threads(1)
    result.write_text(json.dumps(tried(kind, cls, folder)), encoding="utf-8")


def run(number: int, seed: int) -> list[Drawn]:
    """Print every type and reason as it is tried, and the shares."""
    found = []
    print(f"{len(classes())} types; {number} by lot, seed {seed}", flush=True)
    for one in drawn(number, seed):
        found.append(one)
        said = "; ".join(f"{word} {state} {why}".strip() for word, (state, why) in one.cells.items())
        print(f"{one.kind:24} {one.cls:40} {said or 'not made small'}", flush=True)
    print(summary(found, seed))
    return found


def summary(found: list[Drawn], seed: int) -> str:
    """One sentence: of how many types each pass goes through, and what could not be made small."""
    of, left = [one for one in found if one.is_made], [one.kind for one in found if not one.is_made]
    both = sum(all(state == "green" for state, _ in one.cells.values()) for one in of)
    said = [f"{both} of {len(of)} types go through both recipes"]
    for word in WORDS:
        count = Counter(one.cells[word][0] for one in of)
        rest = ", ".join(f"{number} {state}" for state, number in sorted(count.items()) if state != "green")
        said.append(f"`{word}` {count['green']} of {len(of)}" + (f" ({rest})" if rest else ""))
    return (
        f"By lot (seed {seed}; late: more than {SECONDS} s): {', '.join(said)}; "
        f"no tiny config could be built for: {', '.join(left) or 'none'}."
    )


def put_into(page: str, line: str) -> str:
    """A page with the sentence of a lot at its end, in place of the one that stood there."""
    rest = re.sub(r"(?m)^By lot \(seed .*\n?", "", page).rstrip("\n")
    return f"{rest}\n\n{line}\n"
