"""`served(...)` runs `effc serve` as a process of its own on a free port."""

import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from effc.compiler.artifacts.artifact import write
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.capture.capture import capture
from effc.compiler.opened import origin_of
from effc.compiler.sources.zoo import zoo
from effc.compiler.targets.native import Native
from effc.compiler.words.context import Settings

from tests.worlds import context

EFFC = (sys.executable, "-c", "import sys; from effc.compiler.cli import main; sys.exit(main())")
TEMPLATE = """\
{%- for m in messages %}
{%- if m.role == 'assistant' and loop.last %}{{ raise_exception('answered already') }}{% endif %}
{{- m.role }}: {{ m.content }}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""

@dataclass(frozen=True)
class Served:
    """A server that runs."""

    process: subprocess.Popen
    name: str
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def complete(self, prompt="And it came to pass", **more):
        given = {"max_tokens": 12, "temperature": 0, **more}
        extra = {name: given.pop(name) for name in ("top_k", "repetition_penalty") if name in given}
        return self.client.completions.create(model=self.name, prompt=prompt, extra_body=extra, **given)

    def post(self, path="/v1/completions", **body):
        return httpx.post(self.url + path, json={"model": self.name, **body}, timeout=60)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])

    def stop(self, number=signal.SIGTERM) -> tuple[int, str]:
        """Its exit code and what it wrote to stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@contextmanager
def serving(place, *flags: str):
    command = [*EFFC, "serve", str(place), "--port", "0", "--threads", "1", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert " at http://" in line, process.communicate(timeout=20)
        name, _, url = line.strip().partition(" at ")
        yield Served(process, name, url.removesuffix("/v1"))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def chatty(tmp_path_factory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("serving") / "chatty"
    shutil.copytree(zoo()["tiny-llama"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def artifact(chatty, tmp_path_factory) -> Path:
    """The same, for the native engine: as it is compiled, less the verification."""
    work = tmp_path_factory.mktemp("serving-artifact")
    origin = origin_of(str(chatty), Settings(cache_dir=work / "cache"))
    program, ctx = capture(origin.load().eval()), context(work, origin)

    def build(folder: Path) -> Manifest:
        Native(path="served").emit(program, folder, ctx)
        return Manifest("native")

    write(work / "served", build=build)
    return work / "served"
