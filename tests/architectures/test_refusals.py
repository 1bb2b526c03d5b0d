"""What can't be decided is said: in the plan, and by the passes that need it, with module and source line."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

NET = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.up(x)
        # twice
        return self.down(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = Odd()

    def forward(self, x):
        return x + self.odd(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.dummy_inputs = {"x": torch.randn(2, 3, 8)}

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def make():
    return Net()
"""
TWICE = """if x.mean() > 0:
            x = x * 2"""
MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
}
RECIPE = """effspec 1
model net  = {source}
data  rows = synthetic(4, seed: 0)
pipeline lean(net) {{ a = {step} }}
emit lean {{ pt2("lean") }}
"""


@pytest.fixture
def effc(tmp_path):
    (tmp_path / "mamba.json").write_text(json.dumps(MAMBA))

    def run(verb: str, step: str, *more: str, net=NET, source='module("./net.py:make")') -> subprocess.CompletedProcess:
        (tmp_path / "net.py").write_text(net)
        (tmp_path / "net.effspec").write_text(RECIPE.format(step=step, source=source))
        command = [
            sys.executable,
            "-c",
            "from effc.compiler.cli.main import main; raise SystemExit(main())",
            verb,
            "net.effspec",
            "--trust-remote-code",
            "--cache-dir",
            "cache",
            *more,
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return effc_at(tmp_path, run)


def effc_at(folder, run):
    run.folder = folder
    return run


def test_a_module_that_decides_by_numbers_is_listed_and_what_needs_it_is_refused(effc):
    """Numbers that stand in for weights may not choose for it: it is one node, and a program for torch alone is none."""
    given = ("prune.blocks(remove: 1, score: divergence(rows))",)
    planned = effc("plan", *given, net=NET.replace("# twice", TWICE))
    assert planned.returncode == 0, planned.stderr
    why = "opaque: what runs depends on the numbers in a tensor at net.py:13: `if x.mean() > 0:`"
    assert why in planned.stdout
    refused = effc("compile", *given, net=NET.replace("# twice", TWICE))
    assert refused.returncode == 5 and "error[cannot-export]" in refused.stderr
    assert not (effc.folder / "lean").exists()


KERNEL = """import torch
from torch import nn

kernels = torch.library.Library("hymba_test", "DEF")
kernels.define("scan(Tensor x) -> Tensor")
kernels.impl("scan", lambda x: x, "CUDA")
"""


def test_a_kernel_for_cuda_alone_is_refused_with_module_line_and_what_to_do(effc):
    """Its mixer would be captured where there is such a device; here nothing is known of what it computes."""
    net = NET.replace("\nimport torch\nfrom torch import nn\n", KERNEL).replace(
        "# twice", "x = torch.ops.hymba_test.scan(x)"
    )
    refused = effc("plan", "prune.blocks(remove: 1, score: divergence(rows))", net=net)
    assert refused.returncode == 5, refused.stderr
    assert "layers.0.odd" in refused.stderr and "`x = torch.ops.hymba_test.scan(x)`" in refused.stderr
    assert "net.py:" in refused.stderr and "register a fake" in refused.stderr
    assert len(max(refused.stderr.splitlines(), key=len)) < 500, "torch's table of backends is left out"


def test_the_plan_lists_what_is_one_node_and_which_line_made_it_so(effc):
    listed = effc("plan", "prune.blocks(remove: 1, score: divergence(rows))", source='config("mamba.json")')
    assert listed.returncode == 0, listed.stderr
    assert "note: backbone.layers.0.mixer and 1 more opaque" in listed.stdout
    assert "modeling_mamba.py:" in listed.stdout


def test_a_pass_that_finds_nothing_says_why(effc):
    refused = effc("plan", "prune.channels(keep: 50% of channels)", net=NET.replace("# twice", "x = x.sort(-1)[0]"))
    assert refused.returncode == 3
    assert "note: `layers.0.odd.up`: `sort` does something unknown with its channels" in refused.stderr


def test_a_plain_module_compiles_into_a_program_that_torch_alone_runs(effc):
    done = effc("compile", "prune.blocks(remove: 1, score: divergence(rows))", "-o", "out")
    assert done.returncode == 0, done.stderr
    manifest, measures = (
        json.loads((effc.folder / "out" / "lean" / f"{name}.json").read_text()) for name in ("manifest", "measures")
    )
    assert manifest["kind"] == "pt2" and measures["checks"], "it was reopened"
