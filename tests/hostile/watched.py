"""Run by path: opens many artifacts in one process and says what each came to, with every effect that it had.

`python watched.py HONEST CASES`: HONEST is a folder of artifacts that are opened first, so that what effc and its
libraries load for themselves is loaded; CASES a file with lines `all FOLDER`, to be opened
by every verb, or `turn FOLDER`, by one of them in turn. From then on an audit hook sees every file that is
opened for writing, every process, socket, unpickled class, and every import of a module that is neither of the
packages in use nor of Python. One JSON line a case: {"case", "effects", "outcomes", "seconds"}.
"""

import contextlib
import io
import json
import os
import resource
import sys
import time
from pathlib import Path

FRONTS = ("front", "family", "adapters")  # which hold several models
_OWN = os.environ.get("EFFC_CACHE_DIR", "/nowhere")  # where effc may write
FAKE = "ok: b"  # as `mutations.ODD` puts a line into names and texts
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = (
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.fork",
    "os.forkpty",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.bind",
    "pickle.find_class",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.chown",
    "shutil.rmtree",
    "ctypes.dlopen",
    "winreg.OpenKey",
    "webbrowser.open",
    "urllib.Request",
    "ftplib.connect",
)
watching: list[str] | None = None
known: set[str] | None = None  # packages that honest artifacts import; None while that is learnt


def hook(event, args):
    if watching is None:
        return
    if event == "open":
        path, mode, flags = args
        if isinstance(flags, int) and flags & _WRITES and path != os.devnull and not _is_own(path):
            watching.append(f"open {path} {mode}")
    elif event == "import":
        name = args[0].partition(".")[0]
        if known is None:
            watching.append(name)
        elif name not in known and args[0] not in sys.modules:
            watching.append(f"import {args[0]}")
    elif event == "subprocess.Popen" and "text_child.py" in str(args[1]):
        pass  # which renders the case's template and runs its tokenizer, within limits
    elif event in _EVENTS and not (args and _is_own(args[0])):
        watching.append(f"{event} {str(args)[:100]}")


def _is_own(path) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and f"{os.fsdecode(path)}/".startswith(f"{_OWN}/")


def outcome(call, speaks: bool = True) -> str:
    """What a call came to; `speaks`: its answer is effc's own words, not a model's."""
    from effc.dsl.syntax.diagnostics import Reject

    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as said:
            code = call()
    except Reject as reject:
        return f"refused {reject.diagnostics[0].slug}"
    except SystemExit as leaving:
        return f"SystemExit {leaving.code}"
    except BaseException as error:
        return f"crash {type(error).__name__}: {str(error)[:200]}"
    lines = f"{out.getvalue() if speaks else ''}\n{said.getvalue()}".splitlines()
    if any(line.startswith(FAKE) for line in lines):
        return f"crash: a text passed for a line of ours: {lines}"
    if isinstance(code, int):
        return f"exit {code}" if code != 1 else f"crash exit 1: {said.getvalue()[-300:]}"
    return "opened"


def verbs(case: Path, honest: Path):
    from effc.compiler.artifacts.load import load
    from effc.compiler.cli.main import main
    from effc.compiler.driver.models import model_errors_as_diagnostics

    def computed():
        import torch

        model = load(case)
        with torch.no_grad(), model_errors_as_diagnostics(str(case)):
            model(input_ids=torch.randint(3, 30, (2, 5)))

    yield "load", computed
    for words in (
        ["verify", case],
        ["inspect", case, "--offline"],
        ["run", case, "--prompt", "1 2", "--max-new-tokens", "4", "--offline"],
        ["diff", honest, case],
        ["test", case, "--offline"],
        ["report", case, "-o", f"{_OWN}/report.html"],
    ):
        yield words[0], lambda words=words: main([str(word) for word in words])


def main(honest: str, cases: str) -> None:
    global watching, known
    import torch

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    watching, honests = [], sorted(Path(honest).iterdir())
    for artifact in honests:
        opened = [outcome(call) for _, call in verbs(artifact, honests[0])]
        loads = "refused other-kind" if artifact.name in FRONTS else "opened"
        assert opened[:2] == [loads, "exit 0"] and not any("crash" in o for o in opened), (artifact, opened)
    known = {*watching, *(name.partition(".")[0] for name in sys.modules), *sys.stdlib_module_names}
    for number, line in enumerate(Path(cases).read_text().splitlines()):
        each, _, case = line.partition(" ")
        calls = list(verbs(Path(case), honests[0]))
        if each == "turn":
            calls = [calls[number % len(calls)]]
        watching, started, before = [], time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes = {name: outcome(call, speaks=name != "run") for name, call in calls}
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        effects, watching = watching, None
        print(
            json.dumps(
                {
                    "case": case,
                    "effects": effects,
                    "outcomes": outcomes,
                    "mebibytes": grown,
                    "seconds": round(time.process_time() - started, 2),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
