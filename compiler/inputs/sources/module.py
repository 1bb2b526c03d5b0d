"""A module that the user's own Python file makes."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.source_file import irregular_kind_of_path
from ...core.cache import canonical_json_sha256
from ...core.json_errors import first_line, reject_on_error
from ...core.safe_read import CONFIG, read_json
from ...models.checkpoints.model_folder import no_tokenizer, remote_code
from ...models.checkpoints.origin import Origin
from ...models.checkpoints.source_files import SourceFiles
from ...plugin.context import Context
from ...plugin.interfaces import Source, param

if TYPE_CHECKING:
    from torch import nn

user_module = Fault(
    "user-module",
    "A Python file that is to make the model does not.\n\n"
    "The function is called with the config as a dict where one is given, else with nothing, and returns a "
    "torch.nn.Module.",
)


class Module(Source):
    """A module that the user's own Python file makes.

    `file.py:make` names a function that returns a `torch.nn.Module`; with `config`, it is given that JSON file
    as a dict. torch's generator is seeded before it runs, so random weights repeat. It runs only where
    `--trust-remote-code` is given on the command line. Files that the file imports don't count towards the
    model's identity: keep what decides the model in the file or the config.

    Source: own.
    Example: model net = module("./net.py:make", config: "net.json")
    """

    place: str = param("File and function, `file.py:make`, relative to the recipe.", positional=True)
    config: str | None = param("A JSON file that the function is given as a dict.", default=None)
    seed: int = param("Seeds torch before the function runs.", default=0, ge=0)

    def resolve(self, ctx: Context) -> Origin:
        label = f'module("{self.place}")'
        name, _, function = self.place.rpartition(":")
        if not name or not function.isidentifier():
            raise user_module(
                f"{label} does not name a file and a function", help='write it as "./file.py:make"'
            ).rejection()
        file = ctx.folder / Path(name).expanduser()
        if kind := irregular_kind_of_path(file):
            raise user_module(f"{label}: {file} is {kind}, where a file is needed", help="name a file").rejection()
        if not os.path.isfile(file):
            raise user_module(f"{label}: there is no file {file}", help="paths are relative to the recipe").rejection()
        if not ctx.settings.trust_remote_code:
            raise remote_code(f"{label} runs {file}", help="read that file, then add --trust-remote-code").rejection()
        config = _read_config(ctx.folder / self.config, label) if self.config else None
        files = SourceFiles(ctx.settings.cache_dir)
        code = files.hash(file)
        make = partial(_run_user_function, file, function, config, self.seed, label)
        return Origin(
            label=label,
            config={"model_type": "module", "function": function, **(config or {})},
            folder=None,
            identity=canonical_json_sha256(["module", code, function, config, self.seed]),
            build=make,
            load=partial(_make_and_check_model, make, label),
            tokenizer=no_tokenizer,
            code=code,
            files=files,
        )


def _read_config(path: Path, label: str) -> dict[str, Any]:
    with reject_on_error(user_module, f"{label}: {path} can't be read as JSON"):
        config = read_json(path, CONFIG)
    if not isinstance(config, dict):
        raise user_module(f"{label}: {path} is not a JSON object").rejection()
    return config


def _run_user_function(file: Path, function: str, config: dict | None, seed: int, label: str) -> "nn.Module":
    from importlib.util import module_from_spec, spec_from_file_location

    import torch

    spec = spec_from_file_location(f"effc_user_{file.stem}", file)
    assert spec and spec.loader, f"{file} is not Python"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            code = module_from_spec(spec)
            spec.loader.exec_module(code)
            module = getattr(code, function)(*([config] if config is not None else []))
        except Exception as error:
            raise user_module(
                f"{label} raises {type(error).__name__}", help="--debug shows where", note=first_line(error)
            ).rejection() from error
    if not isinstance(module, torch.nn.Module):
        raise user_module(f"{label} returned a {type(module).__name__}, not a torch.nn.Module").rejection()
    return module.eval()


def _make_and_check_model(make: "Callable[[], nn.Module]", label: str) -> "nn.Module":
    from ...models.checkpoints.checkpoint import refuse_non_finite_parameters

    module = make()
    refuse_non_finite_parameters(module, label)
    return module
