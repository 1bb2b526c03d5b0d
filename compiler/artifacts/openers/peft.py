"""An adapter folder on the base beside it, by peft and plain transformers: nothing of effc is imported."""

import os
import runpy
import sys

from torch import nn


def load(folder: str, attention: str) -> nn.Module:
    from peft import PeftModel

    load_plain = runpy.run_path(os.path.join(os.path.dirname(__file__), "plain.py"))["load"]
    model = PeftModel.from_pretrained(load_plain(os.path.join(os.path.dirname(folder), "base"), attention), folder)
    assert not any(name.split(".")[0] == "effc" for name in sys.modules), "effc was imported"
    return model.eval()
