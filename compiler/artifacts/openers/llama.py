"""A GGUF file by llama.cpp alone."""

from typing import Any

import torch
from torch import Tensor, nn


class LlamaCpp(nn.Module):
    """llama.cpp's logits of rows, each computed alone; keys and values in float32."""

    def __init__(self, file: str):
        super().__init__()
        import llama_cpp

        exact: dict[str, Any] = {"type_k": 0, "type_v": 0, "flash_attn": False, "n_threads": torch.get_num_threads()}
        self.llama = llama_cpp.Llama(file, n_ctx=64, n_batch=64, logits_all=True, verbose=False, **exact)

    def can_generate(self) -> bool:
        return False

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros((*input_ids.shape, self.llama.n_vocab()))
        for row, (ids, is_token) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            self.llama.reset()
            self.llama.eval(ids[is_token].tolist())
            logits[row, is_token] = torch.tensor(self.llama.scores[: int(is_token.sum())])
        return logits


def load(folder: str, attention: str) -> nn.Module:
    return LlamaCpp(f"{folder}/model.gguf")
