"""The model `effc` of lm-evaluation-harness; importing this module registers it."""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ...artifacts.load import locate_checkpoint_and_artifact, target_class_of_folder, verify_signature_and_files
from ...artifacts.manifest import NAME, artifact_hash
from ...core.cache import default_cache_folder
from ...core.settings import Settings
from ...driver.models import check_model_path, is_artifact, open_model
from ...ir.layers.linear import count_params
from ...runtimes.model import DecoderModel
from ..serving.chat import refuse_without_generate


def usable_device(pretrained: str, device: str | None) -> str:
    """The harness asks for `cuda:0` by default: the CPU where there is none, or the engine runs there alone."""
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        return "cpu"
    if is_artifact(Path(pretrained)):
        folder, manifest = locate_checkpoint_and_artifact(Path(pretrained))
        if target_class_of_folder(folder, manifest[1] if manifest else None).on_cpu:
            return "cpu"
    return device


@register_model("effc")
class ArtifactLM(HFLM):
    """An artifact that decodes, under the harness's own tokenization, scoring and generation.

    The harness calls `forward` and `generate` of whatever engine the artifact has, so that figures compare with those
    of its model `hf` for the original. Encoders and programs of torch without a cache are refused.

    pretrained    an artifact, a model folder, zoo:NAME or hf:ORG/NAME
    signed_by     public key, or a file of some, one of which must have signed the artifact
    device        as the harness has it, but the CPU where the engine runs on nothing else
    threads       that run the engine

    Source: EleutherAI's lm-evaluation-harness, `HFLM` over a model that is open already.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        threads: int | None = None,
        signed_by: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool = False,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ):
        check_model_path(pretrained)
        if signed_by:
            verify_signature_and_files(Path(pretrained), [signed_by])
        settings = Settings(default_cache_folder(), device=usable_device(pretrained, device), threads=threads)
        opened = open_model(pretrained, settings, needs_tokenizer=True)
        refuse_without_generate(opened.model)
        self._path = Path(pretrained)
        super().__init__(
            pretrained=opened.model,
            tokenizer=opened.tokenizer,
            batch_size=batch_size or 1,
            max_batch_size=max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            truncation=truncation,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )

    def get_model_info(self) -> dict[str, Any]:
        """Facts that the harness writes beside results: `model_sha` is the hash of the artifact."""
        model: Any = self.model
        params = model.n_params if isinstance(model, DecoderModel) else None
        return {
            "model_num_parameters": count_params(model) if params is None else params,
            "model_dtype": str(model.dtype),
            "model_sha": artifact_hash(self._path) if (self._path / NAME).is_file() else "",
        }
