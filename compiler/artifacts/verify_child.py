"""Reopens a checkpoint folder in a process of its own and says what it computes.

Run by path, `python -P verify_child.py OPENER FOLDER INPUTS OUTPUTS ...`: the Python file OPENER, which comes with
effc or with a target and never with an artifact, has a function `load(folder, attention)`. Here nothing of effc is
imported, so that a folder for plain transformers is opened without it.
`--nursery` does so in forks of a process that has imported transformers, a job a line (`fork_server.py` asks).
`probe_model` is also what the compiling process runs on its own model, so both sides compute by the same lines.
"""

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from select import select
from typing import Any

import torch
from torch import Tensor, nn

LENGTH, ROWS, STEPS = 12, 2, 8  # of the probe: tokens, rows, generated tokens
GENERATION = ("logits of prefill", "greedy tokens")  # begin the names of what a generation gives
COUNT = "create_position_ids_from_input_ids"  # of transformers: positions of RoBERTa and its kin
TEXT = "text"  # rows that are not compared, and their logits
INPUT_PREFIX = "given."  # before names of a plain module's inputs
STARTS = {"decoder_start_token_id", "bos_token_id"}  # of which `generate` of two sides needs one
OPENED = ".opened"  # behind the name of the outputs: a file that says that the folder is open
CODE_POINTS = 0x110000  # of Unicode, which CANINE hashes: `checkpoints/origin.py` has the same
VOCABULARY_SIZES = ("decoder_vocab_size", "src_vocab_size")  # of a translator with two vocabularies


@torch.no_grad()
def probe_model(model: nn.Module, inputs: dict[str, Tensor], steps: int = STEPS) -> dict[str, Tensor]:
    """Logits of every kind of call that a user makes, and the tokens of a greedy generation.

    inputs   "ids" [rows, length] int64 and "mask", the same shape with zeros at the left of some rows;
             or "pixels" of images, "media" (sounds or images) and "ids", or what a plain module takes, each name
             behind `INPUT_PREFIX`
    """
    if all(name.startswith(INPUT_PREFIX) for name in inputs):
        return {
            "outputs of a batch": first_output(model(**{n.removeprefix(INPUT_PREFIX): x for n, x in inputs.items()}))
        }
    if "pixels" in inputs:
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return {"outputs of a batch": first_output(model(pixel_values=inputs["pixels"].to(kind)))}
    if "media" in inputs:
        return probe_media(model, inputs["media"], inputs["ids"], steps)
    ids, mask = inputs["ids"], inputs["mask"]
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        return probe_encoder_decoder(model, ids, mask, steps)
    padded = first_output(model(input_ids=ids, attention_mask=mask, **position_ids_if_accepted(model, mask)))
    side = "right" if mask[:, 0].all() else "left"
    outputs = {
        "logits of a batch": first_output(model(input_ids=ids)),
        f"logits of a {side}-padded batch": padded * mask[..., None] if padded.dim() == 3 else padded,
    }
    if steps and can_continue_ids(model):
        for name, mask_used in (("", torch.ones_like(mask)), (", left-padded", mask)):
            generated = generate_greedy(model, ids, mask_used, steps)
            outputs[f"logits of prefill and {steps - 1} decode steps{name}"] = torch.stack(generated.logits, 1).float()
            outputs[f"greedy tokens{name}"] = generated.sequences[:, ids.shape[1] :].clone()
    return outputs


@torch.no_grad()
def logits_of_rows(model: nn.Module, rows: Tensor) -> Tensor:
    """[rows, length, vocabulary] in float32, each row computed alone; all of its tokens have positions."""
    skips = first_position_id(model) or getattr(model, "uncounted", None) is not None  # RoBERTa's kin, some tokens
    kwargs = position_ids_if_accepted(model, torch.ones_like(rows[:1])) if skips else {}
    return torch.cat([first_output(model(input_ids=row[None], **kwargs)) for row in rows])


def probe_encoder_decoder(model: nn.Module, ids: Tensor, mask: Tensor, steps: int) -> dict[str, Tensor]:
    """Probe an encoder with a decoder: rows are the source and, reversed, the target."""
    decoder_ids = ids.flip(1)[:, : LENGTH // 2]
    side = "right" if mask[:, 0].all() else "left"
    outputs = {
        "logits of a batch": first_output(model(input_ids=ids, decoder_input_ids=decoder_ids)),
        f"logits of a {side}-padded batch": first_output(
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)
        ),
    }
    if steps and can_continue_ids(model):
        for name, mask_used in (("", torch.ones_like(mask)), (f", {side}-padded", mask)):
            generated = generate_greedy(model, ids, mask_used, steps)
            outputs[f"logits of prefill and {steps - 1} decode steps{name}"] = torch.stack(generated.logits, 1).float()
            outputs[f"greedy tokens{name}"] = generated.sequences[:, -steps:].clone()
    return outputs


def probe_media(model: nn.Module, media: Tensor, ids: Tensor, steps: int) -> dict[str, Tensor]:
    """Outputs for sounds or images, at once and token by token: `generate` has rules that not every config follows."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    hears = {getattr(model, "main_input_name", "input_features"): media.to(kind)}
    full = model(**hears, decoder_input_ids=ids, use_cache=True)
    kwargs, parts = {"encoder_outputs": encoder_outputs(model, hears, full), "use_cache": True}, [first_output(full)]
    for position in range(min(steps, getattr(model.config, "max_target_positions", steps))):
        out = model(decoder_input_ids=ids[:, position % ids.shape[1], None], **kwargs)
        kwargs["cache"] = out.get("cache")
        parts.append(first_output(out))
    return {"logits of a batch, and of decode steps": torch.cat(parts, 1)}


def encoder_outputs(model: Any, inputs: dict[str, Tensor], output: Any) -> Any:
    """Outputs of a model's encoder in its own form: decoders ask for more than states. An engine has those alone."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else model
    return (output.encoder_last_hidden_state,) if encoder is model else encoder(*inputs.values())


def position_ids_if_accepted(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Positions that count a row's own tokens, for models that take some, from the first that the model knows."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0) + first_position_id(model)}


def first_position_id(model: nn.Module) -> int:
    """The number of a row's first position: RoBERTa and its kin begin behind the one of padding, where they are given
    none; `generate` gives positions from 0 on, which they never met in training. An encoder of the engine says its own.
    """
    if type(declared := getattr(model, "first_position", None)) is int:
        return declared
    for module in model.modules():
        home = sys.modules.get(type(module).__module__)  # which counts for Luke and MPNet, whose classes do not
        numbering, padding = getattr(module, COUNT, getattr(home, COUNT, None)), getattr(module, "padding_idx", None)
        if callable(numbering) and type(padding) is int:
            return int(numbering(torch.tensor([[padding + 1]]), padding)[0, 0])
    return 0


def can_continue_ids(model: Any) -> bool:
    """Whether a model's `generate` goes on from token ids: Pop2Piano's wants sounds, decoders of two sides a start."""
    can = getattr(model, "can_generate", bool)()
    parameters = inspect.signature(model.generate).parameters.values() if can else None
    needed = {p.name for p in parameters or () if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and parameters is not None:
        needed |= STARTS if not any(vars(model.generation_config).get(name) is not None for name in STARTS) else set()
    return parameters is not None and needed <= {"input_ids", "inputs", "attention_mask", "generation_config"}


def generate_greedy(model: Any, ids: Tensor, mask: Tensor, steps: int) -> Any:
    from transformers import GenerationConfig

    plain = {"do_sample": False, "num_beams": 1, "use_cache": True, "pad_token_id": 0, "output_logits": True}
    greedy = GenerationConfig(max_new_tokens=steps, min_new_tokens=steps, return_dict_in_generate=True, **plain)
    kwargs = position_ids_if_accepted(model, mask) if first_position_id(model) else {}
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, **kwargs)


def first_output(output) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    if isinstance(output, dict):
        output = output["logits"] if "logits" in output else next(iter(output.values()))
    elif not isinstance(output, Tensor):
        output = output[0]
    return output.float().contiguous()


def inputs_for_config(config, seed: int = 0, with_images: bool = False, pad_right: bool = False) -> dict[str, Tensor]:
    """Fixed inputs for a model of that config: token rows, the later ones padded at the left, or pixels.

    with_images      the model reads pixels, whatever its config counts (BEiT's has a vocabulary of picture tokens)
    pad_right   rows are padded behind their texts, as encoders' are: some say what a text is by its first token
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [getattr(config, name, None) for name in ("text_config", "encoder", "decoder")]
    sizes = [getattr(part, "vocab_size", None) for part in (*parts, config)]
    sizes += [getattr(config, side, None) for side in VOCABULARY_SIZES]
    sizes += [CODE_POINTS if getattr(config, "num_hash_buckets", None) else None]
    words = min((size for size in sizes if size), default=0)  # ids that both sides know
    if with_images or not words:
        if not hasattr(config, "num_channels"):  # it stands with the part that looks
            config = getattr(config, "vision_config", None) or getattr(config, "backbone_config", config)
        size = getattr(config, "image_size", 64)
        shape = (getattr(config, "num_channels", 3), *(size if isinstance(size, (list, tuple)) else (size, size)))
        return {"pixels": torch.rand(ROWS, *shape, generator=generator)}
    ids = torch.randint(min(3, words - 1), words, (ROWS, LENGTH), generator=generator)  # special tokens come first
    mask = torch.ones_like(ids := ids.masked_fill(ids == (getattr(config, "pad_token_id", None) or 0), words - 1))
    mask[ROWS // 2 :, : LENGTH // 3] = 0
    return {"ids": ids, "mask": mask.flip(1) if pad_right else mask}


def load_opener(opener: str) -> Callable[[str, Any], nn.Module]:
    """Function `load` of a Python file, which is no module of a package that could be imported here."""
    spec = spec_from_file_location("opener", opener)
    assert spec is not None and spec.loader is not None, f"{opener} is no Python file"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load


def main(
    opener: str, folder: str, inputs_file: str, outputs: str, attention: str, threads: str, steps: str = str(STEPS)
):
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(int(threads))
    attends = json.loads(attention) if attention.startswith("{") else attention  # of each part, where they differ
    inputs, model = load_file(inputs_file), load_opener(opener)(folder, attends)
    open(outputs + OPENED, "w").close()
    text = inputs.pop(TEXT, None)
    outputs_named = probe_model(model, inputs, int(steps))
    if text is not None:
        outputs_named[TEXT] = logits_of_rows(model, text)
    save_file(outputs_named, outputs)


def serve_forks(idle_s: float) -> None:
    """Answer each job with the exit status of its fork, until nobody has asked for `idle_s` seconds."""
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel  # noqa: F401 (forks have them)

    while select([sys.stdin.buffer], [], [], idle_s)[0] and (line := sys.stdin.buffer.readline()):
        job = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(run_job(job))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def run_job(job: dict) -> int:
    """Run one job in a fork with its own environment, folder and stderr. The exit status as Python would have it."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    stderr = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    devnull = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, devnull), (1, devnull), (2, stderr)):
        os.dup2(source, target)
    try:
        main(*job["arguments"])
        return 0
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    except BaseException:
        traceback.print_exc()  # to a stderr that Python buffers by lines
        return 1


if __name__ == "__main__":
    serve_forks(float(sys.argv[2])) if sys.argv[1:2] == ["--nursery"] else main(*sys.argv[1:])
