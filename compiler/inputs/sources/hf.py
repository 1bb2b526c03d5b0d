"""A model in the Hugging Face layout: a folder, or a repository of the hub."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...core.settings import Settings
from ...models.checkpoints.model_folder import origin_of_folder
from ...models.checkpoints.origin import Origin
from ...plugin.context import Context
from ...plugin.interfaces import Source, param

hub_unreachable = Fault(
    "hub-unreachable", "A file of the model hub is needed and the hub can't be reached.", exit="network"
)
hub_error = Fault(
    "hub-refused", "The model hub has no such repository or revision, or does not show it to you.", exit="network"
)

# What is fetched: never a pickle, never code unless it was granted.
HUB_PATTERNS = tuple(
    """
    *.safetensors *.safetensors.index.json config.json generation_config.json tokenizer*
    special_tokens_map.json vocab.* merges.txt added_tokens.json chat_template.* spiece.model
    tekken.json modules.json sentence_bert_config.json config_sentence_transformers.json
    *_Pooling/config.json *_Dense/config.json
    """.split()
)


class Hf(Source):
    """A model in the Hugging Face layout: a folder, or a repository of the hub.

    A name that starts with `.`, `/` or `~` is a folder, relative to the recipe; any other is a repository.
    Weights are read from safetensors only and mapped from disk, not copied; pickles are refused. Code that
    comes with a model never runs unless `--trust-remote-code` is given on the command line. From the hub only
    config, tokenizer and safetensors files are fetched, into the hub's own cache (`HF_HOME`); with `--offline`
    or `HF_HUB_OFFLINE=1` what lies there is used.

    Source: huggingface_hub `snapshot_download`; transformers `from_pretrained`.
    Example: model base = hf("HuggingFaceTB/SmolLM2-135M-Instruct", revision: "main")
    """

    name: str = param("Folder or repository.", positional=True)
    revision: str = param("Branch, tag or commit of the repository; no meaning for a folder.", default="main")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = param(
        "What weights are held and computed in; `auto` keeps the files' own.", default="auto"
    )

    def resolve(self, ctx: Context) -> Origin:
        label = f'hf("{self.name}")'
        if self.name.startswith((".", "/", "~")):
            path = Path(self.name).expanduser()
            help = "" if path.is_absolute() else f"a relative folder is looked for in {ctx.folder.resolve()}"
            return origin_of_folder(ctx.folder / path, label, self.dtype, ctx.settings, help=help)
        try:
            fetched = self._download_snapshot(label, ctx.settings)
        except Reject as rejection:
            if os.path.isfile(ctx.folder / self.name / "config.json"):
                help = f'a folder of that name lies beside the recipe: write hf("./{self.name}")'
                raise Reject(*(replace(d, help=help) for d in rejection.diagnostics)) from rejection
            raise
        return origin_of_folder(fetched, label, self.dtype, ctx.settings)

    def _download_snapshot(self, label: str, settings: Settings) -> Path:
        from huggingface_hub import errors, snapshot_download

        patterns = [*HUB_PATTERNS, *(("*.py",) if settings.trust_remote_code else ())]
        offline = settings.offline or _is_hub_offline()
        try:
            return Path(
                snapshot_download(self.name, revision=self.revision, allow_patterns=patterns, local_files_only=offline)
            )
        except errors.HFValidationError as error:
            raise hub_error(
                f"{label} is neither a folder nor a repository name",
                help='a folder is written "./folder", a repository "org/name"; '
                'a model that comes with effc is zoo("tiny-llama")',
            ).rejection() from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError) as error:
            raise hub_error(
                f"{label}: the hub shows no revision `{self.revision}` of it",
                help="check name and revision; a gated model needs `hf auth login`",
            ).rejection() from error
        except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
            raise _hub_unreachable_diagnostic(label, offline).rejection() from error


def _is_hub_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _hub_unreachable_diagnostic(label: str, offline: bool) -> Diagnostic:
    if offline:
        return hub_unreachable(
            f"{label} is not in the hub's cache and fetching is off",
            help="run once without --offline, or name a folder",
        )
    return hub_unreachable(
        f"{label}: the hub can't be reached and the model is not in its cache",
        help="check the network, or name a folder",
    )
