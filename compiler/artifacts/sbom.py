"""`sbom.json`: what a build used, as a CycloneDX 1.6 bill of materials that scanners read."""

import hashlib
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from ..core.environment import distributions_of_dependencies
from ..plugin import plugin_packages
from .manifest import Manifest, readable_json_bytes

_SPEC = "1.6"


def cyclonedx_json(manifest: Manifest) -> bytes:
    """The installed packages that effc may use and those with plug-ins, whichever of them this process has imported (a
    run that goes on after a kill imports fewer), Python, and the model and data that went in, by the hashes that the
    lock has."""
    plugins = {plugin.distribution.name: plugin.distribution for plugin in plugin_packages.installed_plugin_packages()}
    packages = [
        _package_component(name, package)
        for name, package in sorted({**plugins, **distributions_of_dependencies()}.items())
    ]
    inputs = [_input_component(label, identity) for label, identity in sorted(manifest.lock.get("inputs", {}).items())]
    python = ".".join(map(str, sys.version_info[:3]))
    interpreter = {"type": "platform", "bom-ref": "python", "name": "python", "version": python}
    product = {
        "type": "machine-learning-model",
        "bom-ref": "artifact",
        "name": manifest.name or manifest.kind,
        "version": (manifest.lock.get("versions") or {}).get("effc", manifest.effc) or "0",
    }
    components = [interpreter, *packages, *inputs]
    depends = {"ref": "artifact", "dependsOn": [c["bom-ref"] for c in components]}
    metadata_of: dict[str, Any] = {
        "component": product,
        "tools": {"components": [{"type": "application", "name": "effc", "version": manifest.effc or "0"}]},
    }
    body = {
        "bomFormat": "CycloneDX",
        "specVersion": _SPEC,
        "version": 1,
        "components": components,
        "metadata": metadata_of,
        "dependencies": [depends],
    }
    serial = uuid5(NAMESPACE_URL, readable_json_bytes(body).decode())
    stamp = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    body["serialNumber"], metadata_of["timestamp"] = f"urn:uuid:{serial}", stamp
    return readable_json_bytes(body)


@cache  # its description is parsed for that
def _package_component(name: str, distribution: metadata.Distribution) -> dict[str, Any]:
    address = f"pkg:pypi/{name}@{distribution.version.replace('+', '%2B')}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": address,
        "name": name,
        "version": distribution.version,
        "purl": address,
    }
    if files := distribution.read_text("RECORD"):  # hashes of all its files; pip keeps none of the wheel
        record = hashlib.sha256("".join(sorted(files.splitlines(keepends=True))).encode()).hexdigest()
        component["properties"] = [{"name": "effc:sha256 of RECORD, sorted", "value": record}]
    license = next(iter(distribution.metadata.get_all("License-Expression") or ()), "")
    return component | ({"licenses": [{"expression": license}]} if license else {})


def _input_component(label: str, identity: Any) -> dict[str, Any]:
    """A model or a data set. Its identity is effc's own hash of content and arguments, so it is a property."""
    kind = "data" if label.startswith("data ") else "machine-learning-model"
    return {
        "type": kind,
        "bom-ref": f"input {label}",
        "name": label.removeprefix("data "),
        "properties": [{"name": "effc:identity", "value": str(identity)}],
    }
