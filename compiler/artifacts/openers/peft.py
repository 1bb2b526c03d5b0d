"""An adapter folder on the base beside it, by peft and plain transformers: nothing of effc is imported."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location

from torch import nn


def load(folder: str, attention: str) -> nn.Module:
    from peft import PeftModel

    spec = spec_from_file_location("plain", os.path.join(os.path.dirname(__file__), "plain.py"))
    assert spec is not None and spec.loader is not None, "effc lacks openers/plain.py"
    plain = module_from_spec(spec)
    spec.loader.exec_module(plain)
    model = PeftModel.from_pretrained(plain.load(os.path.join(os.path.dirname(folder), "base"), attention), folder)
    assert not any(name.split(".")[0] == "effc" for name in sys.modules), "effc was imported"
    return model.eval()
