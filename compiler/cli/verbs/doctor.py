"""`effc doctor`: is everything here that effc needs, and what to do where it isn't."""

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from ....dsl.syntax.diagnostics import EXITS, Reject
from .flags import SharedFlags, make_verb
from .options import option
from .verify import check_artifact_files

TELLING = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "asimddp")
LITTLE = 2 << 30  # bytes free below which a compile of a small model may not fit


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `state` is "ok", "note" (works, but) or "missing"."""

    topic: str
    fact: str
    state: str = "ok"
    remedy: str = ""


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("cache", "machine"))
    def doctor(
        shared: SharedFlags,
        architectures: Annotated[
            bool,
            option(
                "Show instead which architectures were tried with which passes.", "--architectures", show_default=True
            ),
        ] = False,
        trust: Annotated[
            Path | None,
            option(
                "Show instead what an artifact would do here, and which checks it passes.",
                "--trust",
                metavar="ARTIFACT",
            ),
        ] = None,
        measure: Annotated[
            bool,
            option(
                "Measure this machine's speeds for plans, and keep them in the cache.", "--measure", show_default=True
            ),
        ] = False,
    ) -> int:
        """Look at Python, packages, instruction sets, cache and disk."""
        if trust is not None:
            return _print_trust_checks(trust, shared)
        if measure:
            return _measure_and_store_speeds(shared)
        if architectures:
            return _print_support_matrix(shared)
        findings = [*python_findings(), *plugin_findings(), *machine_findings(), *storage_findings(shared.cache_folder)]
        missing = [f for f in findings if f.state == "missing"]
        if shared.format == "json":
            body = [{"topic": f.topic, "fact": f.fact, "state": f.state, "remedy": f.remedy} for f in findings]
            shared.screen.answer_json("doctor", "error" if missing else "ok", findings=body)
        else:
            _print_findings(findings, missing, shared)
        return EXITS["environment"] if missing else 0


def _print_trust_checks(path: Path, shared: SharedFlags) -> int:
    """Print every check of an artifact; the exit code of a broken environment where one fails."""
    from ...artifacts.trust import all_trust_checks

    checks = all_trust_checks(
        path, lambda artifact, manifest: check_artifact_files(artifact, manifest, shared.cache_folder)
    )
    has_failure = any(check.state == "bad" for check in checks)
    if shared.format == "json":
        body = [{"topic": c.topic, "fact": c.fact, "state": c.state} for c in checks]
        shared.screen.answer_json("doctor", "error" if has_failure else "ok", checks=body)
    else:
        colors, width = {"ok": "green", "note": "yellow", "bad": "red"}, max(len(c.topic) for c in checks)
        for c in checks:
            state = shared.screen.styled(f"{c.state:<4}", colors[c.state])
            shared.screen.answer(f"{state}  {c.topic:<{width}}  {c.fact}")
    return EXITS["environment"] if has_failure else 0


def _measure_and_store_speeds(shared: SharedFlags) -> int:
    """Measure what plans estimate from, keep it, and say it."""
    import torch

    from ...core.quantity import count_text, duration_text, si_count, size_text
    from ...core.speed_cache import store_speeds
    from ...core.speeds import measure_machine_speeds

    if shared.threads:
        torch.set_num_threads(shared.threads)
    shared.cache_folder.mkdir(parents=True, exist_ok=True)
    speeds = measure_machine_speeds(shared.cache_folder, seconds_each=0.5)
    store_speeds(shared.cache_folder, speeds)
    threads, screen = torch.get_num_threads(), shared.screen
    if shared.format == "json":
        screen.answer_json("doctor", "ok", threads=threads, speeds=asdict(speeds))
        return 0
    lines = {
        "products": f"{si_count(speeds.float32)} operations a second in float32, "
        f"{si_count(speeds.bfloat16)} in bfloat16, {si_count(speeds.float64)} in float64",
        "weights": f"{size_text(speeds.read)} a second read by a product of one row, "
        f"{si_count(speeds.look)} numbers looked at",
        "masks": f"{si_count(speeds.select)} weights a second by threshold, {si_count(speeds.sort)} in groups of four",
        "packing": f"{si_count(speeds.pack)} weights a second",
        "hashing": f"{size_text(speeds.hash)} a second",
        "disk": f"{size_text(speeds.disk)} a second written and synced",
        "start": f"{duration_text(speeds.start)} until a fresh process has its libraries",
    }
    screen.answer(screen.table([("", count_text(threads, "thread")), *lines.items()]))
    screen.note(f"kept in {shared.cache_folder}: `effc plan` estimates from it. On a busy machine measure again later")
    return 0


def _print_support_matrix(shared: SharedFlags) -> int:
    """The matrix that the test run left, and every sentence that refused something."""
    from ...core.architectures import parse_architecture_matrix

    table, screen = parse_architecture_matrix(), shared.screen
    if shared.format == "json":
        screen.answer_json("doctor", "ok", architectures=asdict(table))
        return 0
    rows = [("", *table.columns)]
    rows += [(name, *(cells[column] for column in table.columns)) for name, cells in table.cells.items()]
    screen.answer(screen.table(rows))
    screen.answer("")
    for reason, models in table.refusals.items():
        screen.answer(f"{models[0]}: {reason}")
    screen.answer("")
    screen.answer(table.summary)
    return 0


def _print_findings(findings: list[Finding], missing: list[Finding], shared: SharedFlags) -> None:
    screen = shared.screen
    colors = {"ok": "green", "note": "yellow", "missing": "red"}
    width = max(len(f.topic) for f in findings)
    for f in findings:
        state = screen.styled(f"{f.state:<7}", colors[f.state])
        screen.answer(f"{state}  {f.topic:<{width}}  {f.fact}")
        if f.remedy and f.state != "ok":
            screen.answer(" " * (width + 11) + screen.styled(f.remedy, "dim"))
    from ...core.quantity import count_text

    screen.note("" if not missing else f"{count_text(len(missing), 'required thing')} missing")


def plugin_findings() -> list[Finding]:
    """Installed packages with plug-ins: their code runs with effc's rights."""
    from ...plugin.plugin_packages import installed_plugin_packages, invalid_plugin

    try:
        return [
            Finding("plug-ins", f"{p.name}, of {p.distribution.name} {p.distribution.version}")
            for p in installed_plugin_packages()
        ]
    except Reject as rejection:
        assert rejection.diagnostics[0].fault == invalid_plugin
        return [Finding("plug-ins", rejection.diagnostics[0].message, "missing", rejection.diagnostics[0].help)]


def python_findings() -> list[Finding]:
    """Python and every package, with the range that effc states."""
    from ...core.environment import Package, python_version, required_packages_with_state

    new_enough = sys.version_info >= (3, 11)
    findings = [
        Finding(
            "python",
            f"{python_version()}, needs >=3.11",
            "ok" if new_enough else "missing",
            "" if new_enough else "install Python 3.11 or newer",
        )
    ]
    extras: dict[tuple[str, str], list[Package]] = {}  # several want the same, which is said once
    for p in required_packages_with_state():
        extras.setdefault((p.name, p.range), []).append(p)
    for p, *further in extras.values():
        state = "ok" if p.state == "ok" else "note" if p.group else "missing"
        group = f"  [{', '.join(x.group for x in (p, *further))}]" if p.group else ""
        fact = f"{p.version}, needs {p.range}" if p.version else f"not installed, needs {p.range}"
        findings.append(Finding(p.name, fact + group, state, p.remedy if state != "ok" else ""))
    return findings


def machine_findings() -> list[Finding]:
    """Processor, instruction sets that our kernels can use, cores."""
    from ...core.environment import cpu_flags, cpu_model_name
    from ...core.fingerprint import usable_cpu_count

    telling = [f for f in TELLING if f in cpu_flags()]
    cores = usable_cpu_count()
    return [
        Finding("processor", f"{cpu_model_name()}, {cores} usable core{'s' * (cores > 1)}"),
        Finding("instructions", ", ".join(telling) or "no vector sets that effc knows"),
        kernel_finding(),
        sandbox_finding(),
        Finding("threads", f"{os.environ.get('OMP_NUM_THREADS') or cores} unless --threads says otherwise"),
    ]


def sandbox_finding() -> Finding:
    """Parts of the sandbox of `SECURITY.md` that this kernel has."""
    from ...core.sandbox import landlock_version

    version = landlock_version()
    if not version:
        return Finding("sandbox", "this kernel has no Landlock, so that verbs that read are not confined", "note")
    return Finding("sandbox", f"Landlock {version} and seccomp")


def kernel_finding() -> Finding:
    """Whether the native kernels are there, at which level of instruction sets they run, and why at that."""
    from ....kernels.levels import NoSuchLevel, active_level_and_reason, load_library

    if load_library() is None:
        return Finding(
            "kernels",
            "not compiled, or by an older effc; torch is used instead",
            "note",
            "install effc again, or from a wheel for this platform",
        )
    try:
        return Finding("kernels", f"compiled, {active_level_and_reason()}")
    except NoSuchLevel as error:
        return Finding("kernels", str(error), "missing", "unset EFFC_ISA, or name a level that is here")


def storage_findings(cache: Path) -> list[Finding]:
    """The cache, whether it can be written, and what is free on its disk."""
    from ...core.quantity import count_text, size_text

    existing = next(p for p in (cache, *cache.absolute().parents) if p.exists())
    files = [f for f in cache.rglob("*") if f.is_file()] if cache.is_dir() else []
    used = sum(f.stat().st_size for f in files)
    steps = sum(1 for _ in (cache / "steps").glob("*.json"))
    fact = f"{cache}, {count_text(steps, 'step')}, {size_text(used)}" if cache.is_dir() else f"{cache}, not made yet"
    writable = os.access(existing, os.W_OK)
    findings = [
        Finding(
            "cache",
            fact,
            "ok" if writable else "missing",
            "" if writable else "no permission to write there; name another with --cache-dir",
        )
    ]
    free = shutil.disk_usage(existing).free
    findings.append(
        Finding(
            "disk",
            f"{size_text(free)} free where the cache is",
            "ok" if free > LITTLE else "note",
            "" if free > LITTLE else "effc cache gc frees what is no longer used",
        )
    )
    hub = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    findings.append(Finding("models", f"{hub}" + (", offline" if os.environ.get("HF_HUB_OFFLINE") else "")))
    return findings
