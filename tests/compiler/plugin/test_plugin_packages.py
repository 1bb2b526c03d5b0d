"""Plug-ins of installed packages: found by their entry point, read without an import, used as effc's own are."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from textwrap import dedent

import pytest

from tests.compiler.cli.verbs.conftest import own_cache, process  # noqa: F401

HALVE = '''
    """Halve weights of linear modules."""

    from effc.plugin import Context, Lossy, Pass, Program, Ratio, Selector, chosen_parts, replace_weight, param, skeleton_of
    from effc.plugin import finite_weight


    class Halve(Pass):
        """Multiply weights of linear modules.

        Source: own.
        Example: half = acme.halve(on: "*_proj")
        """

        keeps = Lossy()
        acts_on = "linear"
        changes = ("weights",)

        by: Ratio = param("Factor.", default=Ratio(0.5), gt=0)
        on: Selector | None = param("Linear modules.", default=None)

        def run(self, program: Program, ctx: Context) -> None:
            for part in chosen_parts(skeleton_of(program), self.on):
                replace_weight(program, part.path, finite_weight(program, part.path) * self.by.value, ctx)
            program.changed()
    '''
VAULT = '''
    """A folder that transformers opens."""

    from pathlib import Path

    from effc.plugin import Context, Fault, Form, LoadRequest, Program, Reject, RunRequest, Target

    vault_damaged = Fault("vault-damaged", "A vault has no seal.", exit="environment")


    class Contents:
        def to_text(self):
            return "a vault of one model"

        def to_json(self):
            return {"vault": 1}


    class Vault(Target):
        """A folder that transformers opens.

        Source: own.
        Example: acme.vault("vault")
        """

        loads = {"vault": "`vault/` is opened by `effc.load`."}
        does = {"vault": "acme maps its safetensors"}

        def emit(self, program: Program, into, ctx: Context) -> None:
            program.model.save_pretrained(into / "vault")
            ctx.tokenizer.save_pretrained(into / "vault")
            (into / "vault" / "seal.txt").write_text("sealed")

        def forms(self):
            return (Form("vault", "effc"), Form("vault", str(Path(__file__).with_name("_open.py"))))

        @classmethod
        def open(cls, folder, load_request: LoadRequest):
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(folder).eval(), None

        @classmethod
        def check_folder(cls, folder) -> None:
            if (folder / "seal.txt").read_text() != "sealed":
                raise Reject(vault_damaged(f"{folder} has no seal", help="seal it"))

        @classmethod
        def run(cls, request: RunRequest) -> bool:
            request.screen.answer(f"the vault heard {request.text()}")
            return True

        @classmethod
        def summary(cls, folder):
            return Contents()
    '''
OPEN = """
    import sys

    from transformers import AutoModelForCausalLM


    def load(folder, attention):
        assert not any(name.split(".")[0] in ("effc", "effc_acme") for name in sys.modules)
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    """
RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline small(base) {
  half = acme.halve(on: "*.mlp.*", by: 90%)
}
emit small { acme.vault("vault") }
"""


def installed(site: Path, name: str, files: dict[str, str], entry: str = "") -> Path:
    """A package as pip leaves it below a folder of `sys.path`."""
    for path, text in {"__init__.py": f"raise SystemExit('{name} was imported')\n", **files}.items():
        file = site / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text).lstrip(), encoding="utf-8")
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[effc.plugins]\nacme = {entry or name}\n")
    return site


@pytest.fixture
def acme(tmp_path):
    """A package whose code can be imported, with a pass and a target."""
    files = {"__init__.py": "", "passes/acme/halve.py": HALVE, "targets/acme/vault.py": VAULT}
    files["targets/acme/_open.py"] = OPEN
    (tmp_path / "r.effspec").write_text(RECIPE)
    return str(installed(tmp_path / "site", "effc_acme", files))


RULED = HALVE.replace(
    "        def run(",
    """        def problems(self):
            if self.by.value == 1:
                yield Conflict(("by",), "a factor of 100% changes nothing", "leave the step out")
            yield from self.other_problems()

        def run(""",
)


@pytest.mark.slow
def test_rules_of_a_package_run_without_importing_it_and_where_they_fail_are_a_diagnostic(process, tmp_path):  # noqa: F811
    files = {"passes/acme/halve.py": RULED, "targets/acme/vault.py": VAULT}
    site = installed(tmp_path / "site", "effc_acme", files)
    (tmp_path / "r.effspec").write_text(RECIPE.replace("90%", "100%"))
    done = process("check", "r.effspec", PYTHONPATH=str(site))
    assert done.code == 5 and "error[bad-plugin]: `problems` of the pass `acme.halve` fails" in done.err
    file = Path(site, "effc_acme", "passes", "acme", "halve.py")
    file.write_text(file.read_text().replace("yield from self.other_problems()", ""))
    done = process("check", "r.effspec", PYTHONPATH=str(site))
    assert done.code == 3 and "error[unfit-choices]: a factor of 100% changes nothing" in done.err
    assert "was imported" not in done.err


@pytest.mark.slow
def test_a_recipe_is_checked_without_importing_a_package_that_it_names(process, tmp_path):  # noqa: F811
    site = installed(tmp_path / "site", "effc_acme", {"passes/acme/halve.py": HALVE, "targets/acme/vault.py": VAULT})
    (tmp_path / "r.effspec").write_text(RECIPE)
    done = process("check", "r.effspec", PYTHONPATH=str(site))
    assert done.code == 0, done.err
    (tmp_path / "r.effspec").write_text(RECIPE.replace("90%", "-1%"))
    done = process("check", "r.effspec", PYTHONPATH=str(site))
    assert done.code == 3 and "error[out-of-range]: `by` is -1%" in done.err
    assert "was imported" not in done.err


def test_a_new_pass_that_changes_weights_must_come_before_kernels_without_being_named_there(process, acme, tmp_path):  # noqa: F811
    steps = '  cpu = lower.sparse_cpu(on: "*.mlp.*", format: dense_bf16)\n  half = acme.halve(on: "*.mlp.*")\n'
    (tmp_path / "r.effspec").write_text(RECIPE.replace('  half = acme.halve(on: "*.mlp.*", by: 90%)\n', steps))
    done = process("check", "r.effspec", PYTHONPATH=acme)
    assert done.code == 3 and "error[wrong-order]" in done.err
    assert "lower.sparse_cpu must come after acme.halve" in done.err and "packed weights can't be changed" in done.err


@pytest.mark.slow
def test_a_target_of_a_package_writes_verifies_runs_and_shows_its_artifacts_by_its_own_methods(process, acme, tmp_path):  # noqa: F811
    done = process("compile", "r.effspec", "-o", "out", PYTHONPATH=acme)
    assert done.code == 0, done.err
    artifact = tmp_path / "out" / "vault"
    assert json.loads((artifact / "manifest.json").read_text())["kind"] == "acme.vault"
    checks = json.loads((artifact / "measures.json").read_text())["checks"]
    assert len({c["what"] for c in checks}) * 2 == len(checks), "two forms: by its `open`, and without effc"
    assert "forms vault" in process("verify", artifact, PYTHONPATH=acme).out
    assert process("run", artifact, "--prompt", "me", PYTHONPATH=acme).out == "the vault heard me\n"
    assert "a vault of one model" in process("inspect", artifact, PYTHONPATH=acme).out
    assert "acme maps its safetensors" in process("doctor", "--trust", artifact, PYTHONPATH=acme).out

    done = process("verify", artifact)  # where the package is not installed
    assert done.code == 5 and "error[artifact-broken]" in done.err and "`acme.vault`" in done.err
    damaged = Path(shutil.copytree(artifact, tmp_path / "damaged"))
    (damaged / "vault" / "seal.txt").write_text("broken")
    from tests.hostile.mutations import consistent

    consistent(damaged)
    done = process("verify", damaged, PYTHONPATH=acme)
    assert done.code == 5 and "error[vault-damaged]" in done.err
    file = Path(acme, "effc_acme", "targets", "acme", "vault.py")
    file.write_text(file.read_text().replace("def check_folder", "def check_otherwise"))  # a target without rules
    done = process("verify", artifact, PYTHONPATH=acme)
    assert done.code == 5 and "error[unchecked-form]" in done.err


def test_a_package_in_the_working_directory_is_not_installed(process, tmp_path):  # noqa: F811
    installed(tmp_path, "effc_acme", {"passes/acme/halve.py": HALVE})
    done = process("passes", "--all", cwd=tmp_path)
    assert done.code == 0 and "acme.halve" not in done.out


@pytest.mark.slow
def test_doctor_and_the_bill_of_materials_name_packages_with_plug_ins(process, acme, tmp_path):  # noqa: F811
    assert "effc_acme, of effc_acme 1.0" in process("doctor", PYTHONPATH=acme).out
    code = "from effc.compiler.artifacts.sbom import cyclonedx_json; from effc.compiler.artifacts.manifest import Manifest\n"
    code += "print(cyclonedx_json(Manifest('hf')).decode())"
    environment = {**os.environ, "PYTHONPATH": acme}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    components = json.loads(done.stdout)["components"]
    assert {"name": "effc_acme", "version": "1.0"}.items() <= next(
        c for c in components if c["name"] == "effc_acme"
    ).items()


@pytest.mark.parametrize(
    "name, files, entry, sentence",
    [
        ("effc_acme", {"passes/prune/heads.py": HALVE}, "", "the pass `prune.heads` is in"),
        ("effc_acme", {"passes/acme/two.py": HALVE.replace('"linear"', "str(1)")}, "", "is not literal"),
        ("effc_acme", {"passes/acme/two.py": "class"}, "", "the header of the pass `acme.two` can't be read"),
        (
            "effc_acme",
            {"passes/acme/two.py": HALVE.replace("by: Ratio", "by: X").replace("class", "X = int | X\n\n\n    class")},
            "",
            "the header of the pass `acme.two` can't be read",
        ),
        ("effc_acme", {}, "nowhere_acme", "names `nowhere_acme`, which is no package here"),
    ],
)
def test_a_package_that_effc_cannot_take_is_a_diagnostic(process, tmp_path, name, files, entry, sentence):  # noqa: F811
    site = installed(tmp_path / "site", name, files, entry)
    done = process("passes", "--all", PYTHONPATH=str(site))
    assert done.code == 5 and "error[bad-plugin]" in done.err and sentence in done.err


@pytest.mark.slow
def test_the_package_of_the_page_about_plug_ins_works(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "plugins.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^`([\w/.]+)`[^\n]*:\n\n```\w*\n(.*?)^```", page, re.M | re.S))
    pyproject = tomllib.loads(blocks.pop("pyproject.toml"))
    assert pyproject["project"]["entry-points"] == {"effc.plugins": {"acme": "effc_acme"}}
    for path, text in blocks.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    site = installed(tmp_path / "src", "effc_acme", {"__init__.py": ""})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "EFFC_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_what_a_package_cannot_import_is_a_diagnostic(process, acme, tmp_path):  # noqa: F811
    file = Path(acme, "effc_acme", "passes", "acme", "halve.py")
    file.write_text(file.read_text().replace("from effc.plugin import finite_weight", "import no_such_module"))
    done = process("compile", "r.effspec", "-o", "out", PYTHONPATH=acme)
    assert done.code == 5 and "error[bad-plugin]" in done.err and "no_such_module" in done.err
