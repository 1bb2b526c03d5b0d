"""Processes of Python that effc starts import nothing of the folder that they are started in."""

import ast
import os
import subprocess
import sys

import pytest

from tests.test_layout import files, shown, tree

SAFE = ("-P", "-I")  # neither the working directory nor a script's folder comes before the libraries
READ_ONLY = {"compiler/apps/federation/deployment.py"}  # where Flower's commands lie, beside the interpreter


def interpreters(module: ast.Module) -> list[tuple[int, bool]]:
    """Line of every mention of `sys.executable`, and whether a command with a safe flag begins with it."""
    safe = {
        node.elts[0]
        for node in ast.walk(module)
        if isinstance(node, (ast.List, ast.Tuple))
        and len(node.elts) > 1
        and isinstance(flag := node.elts[1], ast.Constant)
        and flag.value in SAFE
    }
    mentions = [
        n for n in ast.walk(module) if isinstance(n, ast.Attribute) and n.attr in ("executable", "_base_executable")
    ]
    return [(n.lineno, n in safe) for n in mentions]


@pytest.mark.slow
def test_every_start_of_python_leaves_the_working_directory_out():
    wrong = [
        f"{shown(file)}:{line}"
        for file in files()
        for line, safe in interpreters(tree(file))
        if not safe and shown(file) not in READ_ONLY
    ]
    assert not wrong


def starts_otherwise(node: ast.AST) -> bool:
    """Whether a statement starts Python, or could, without a mention of `sys.executable`."""
    if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) > 1:
        command = node.elts[0].value if isinstance(node.elts[0], ast.Constant) else None
        return isinstance(command, str) and command.rpartition("/")[2] in ("python", "python3")
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return False
    module, names = getattr(node, "module", "") or "", {alias.name for alias in node.names}
    return bool(
        {"multiprocessing", "runpy", "torch.multiprocessing"} & {module, *names}
        or "ProcessPoolExecutor" in names
        or (module == "sys" and "executable" in names)
    )


def test_python_is_started_by_way_of_sys_executable_alone():
    wrong = [
        f"{shown(file)}:{node.lineno}"
        for file in files()
        for node in ast.walk(tree(file))
        if starts_otherwise(node) and hasattr(node, "lineno")
    ]
    assert not wrong


@pytest.mark.parametrize(
    "start",
    [
        "from effc.compiler.core.speeds import _run_import_process; _run_import_process()",
        "from effc.compiler.cli.editor.hints import _start_forecast_process; p = _start_forecast_process(); p.stdin.close(); p.wait()",
    ],
)
@pytest.mark.slow
def test_a_torch_beside_the_user_is_not_imported(tmp_path, start):
    for name in ("torch", "transformers", "json", "effc"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name}')\n")
    env = {**os.environ, "EFFC_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-P", "-c", start], cwd=tmp_path, env=env, check=True, timeout=120)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", ["effc", "program.py"])
def test_effc_does_not_run_where_python_leaves_out_asserts_which_are_its_checks(script, tmp_path):
    (tmp_path / script).write_text("import effc")
    env = {**os.environ, "PYTHONOPTIMIZE": "1"}
    done = subprocess.run([sys.executable, tmp_path / script], env=env, capture_output=True, text=True)
    assert done.returncode == (5 if script == "effc" else 1) and "checks of untrusted files" in done.stderr
    assert ("Traceback" in done.stderr) == (script != "effc")


def test_no_assert_makes_a_call_of_the_system():
    """`python -O` leaves out what stands in an assert."""
    calls = {"_system_call", "prctl", "syscall", "setrlimit", "setitimer"}
    wrong = [
        f"{shown(file)}:{node.lineno}"
        for file in files()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Assert)
        and any(isinstance(n, (ast.Name, ast.Attribute)) and getattr(n, "id", getattr(n, "attr", "")) in calls
                for n in ast.walk(node.test))
    ]  # fmt: skip
    assert not wrong
