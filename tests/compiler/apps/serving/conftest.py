"""`served(...)` runs `effc serve` as a process of its own on a free port."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.core.settings import Settings
from effc.compiler.driver.models import resolve_origin
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.targets.native import Native
from prometheus_client.parser import text_string_to_metric_families

from tests.drafts import write_artifact
from tests.worlds import context

EFFC = (sys.executable, "-c", "import sys; from effc.compiler.cli.main import main; sys.exit(main())")
TEMPLATE = """\
{%- for t in tools or [] %}{{ t.function.name }} takes {{ t.function.parameters | tojson }}{{ '\\n' }}{% endfor %}
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
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def complete(self, prompt="And it came to pass", **more):
        given = {"max_tokens": 12, "temperature": 0, **more}
        extra = {name: given.pop(name) for name in ("top_k", "repetition_penalty") if name in given}
        return self.client.completions.create(model=self.name, prompt=prompt, extra_body=extra, **given)

    def post(self, path="/v1/completions", **body):
        return httpx.post(self.url + path, json={"model": self.name, **body}, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric over all samples that have these labels."""
        samples = [s for f in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text) for s in f.samples]
        values = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        assert values, f"no {name} with {labels}"
        return sum(values)

    def stop(self, number=signal.SIGTERM) -> tuple[int, str]:
        """Its exit code and what it wrote to stderr."""
        self.process.send_signal(number)
        self.process.communicate(timeout=20)
        return self.process.returncode, self.said()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def lines(self) -> list[dict]:
        """Of the access log."""
        return [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]


@contextmanager
def serving(place, *flags: str, **environment: str):
    command = [*EFFC, "serve", str(place), "--port", "0", "--threads", "1", *flags]
    with tempfile.TemporaryDirectory() as folder, (log := Path(folder) / "stderr").open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment}
        )
        try:
            line = process.stdout.readline()
            assert " at http" in line, log.read_text()
            name, _, url = line.strip().partition(" at ")
            yield Served(process, name, url.removesuffix("/v1"), log)
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def chatty(tmp_path_factory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("serving") / "chatty"
    shutil.copytree(zoo_folders_by_name()["tiny-llama"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def write_native_artifact(folder: Path, model: Path, work: Path) -> None:
    """An artifact for the native engine: as it is compiled, less the verification."""
    origin = resolve_origin(str(model), Settings(cache_dir=work / "cache"))
    program, ctx = capture(origin.load().eval()), context(work, origin)

    def build(into: Path) -> Manifest:
        Native(path="served").emit(program, into, ctx)
        return Manifest("native")

    write_artifact(folder, build=build)


@pytest.fixture(scope="session")
def artifact(chatty, tmp_path_factory) -> Path:
    """The same, for the native engine."""
    work = tmp_path_factory.mktemp("serving-artifact")
    write_native_artifact(work / "served", chatty, work)
    return work / "served"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder, key = tmp_path_factory.mktemp("certificate"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "effc test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - timedelta(1))
        .not_valid_after(now + timedelta(30))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(made.public_bytes(plain[0]))
    (folder / "key.pem").write_bytes(key.private_bytes(*plain))
    return folder / "cert.pem", folder / "key.pem"
