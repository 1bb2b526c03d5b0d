"""Retrieval of samples: from a base in this process, or a server that has one. Only a query's vector leaves."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.safe_read import MALFORMED, parse_strict_json
from .engines.index import Unreachable
from .knowledge import KnowledgeBase, Match
from .sample import parse_sample

_MAX_BYTES = 16 << 20  # of a server's answer
_SLOWEST = 6  # times the wait for one packet, for all of them


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server is asked at its own address: what it redirects to would be given the key."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _read_within_limits(answer: Any, deadline: float) -> bytes:
    """An answer, bounded in bytes and in time, however slowly it comes. Raises TimeoutError."""
    parts, n_bytes = [], 0
    while n_bytes <= _MAX_BYTES and (part := answer.read1(_MAX_BYTES + 1 - n_bytes)):
        parts.append(part)
        n_bytes += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


@dataclass(frozen=True)
class KnowledgeBaseFacts:
    """Facts of a base that a client needs. `centre` is what all its texts share, taken off every vector."""

    version: str
    embedder: str
    centre: Tensor
    samples: int

    def center_and_normalize(self, raw: Tensor) -> Tensor:
        return nn.functional.normalize(raw - self.centre, dim=-1)


@dataclass(frozen=True)
class Retrieved:
    """Samples for a query, the version of the base that gave them, and the bytes that went over the wire."""

    matches: Sequence[Match]
    version: str
    bytes: int = 0


class Retriever(Protocol):
    """Both methods raise Unreachable."""

    def facts(self) -> KnowledgeBaseFacts: ...

    def retrieve(self, vector: Tensor, count: int) -> Retrieved:
        """Samples for a placed vector, `count` at most."""


@dataclass(frozen=True)
class Local:
    base: KnowledgeBase
    selection: str = "diverse"

    def facts(self) -> KnowledgeBaseFacts:
        return KnowledgeBaseFacts(self.base.version, self.base.embedder, self.base.centre, len(self.base.samples))

    def retrieve(self, vector: Tensor, count: int) -> Retrieved:
        return Retrieved(self.base.search(vector, count, self.selection), self.base.version)


@dataclass(frozen=True)
class RemoteRetriever:
    """A server of `effc serve OUT --role server`."""

    url: str
    key: str = ""
    seconds: float = 5.0

    def facts(self) -> KnowledgeBaseFacts:
        body, _ = self._request_json_and_byte_count("/v1/knowledge", None)
        return _parse_base_facts(body)

    def retrieve(self, vector: Tensor, count: int) -> Retrieved:
        sent = json.dumps({"vector": [round(v, 6) for v in vector.tolist()], "count": count}).encode()
        body, received = self._request_json_and_byte_count("/v1/retrieve", sent)
        try:
            matches = [Match(parse_sample(row["sample"]), float(row["score"])) for row in body["matches"]]
            return Retrieved(matches[:count], str(body["version"]), len(sent) + received)
        except MALFORMED as error:
            raise Unreachable(f"{self.url} answered something else than samples") from error

    def _request_json_and_byte_count(self, url_path: str, request_body: bytes | None) -> tuple[Any, int]:
        text = self._request_bytes(url_path, request_body)
        if len(text) > _MAX_BYTES:
            raise Unreachable(f"{self.url} answered more than {_MAX_BYTES} bytes")
        try:
            return parse_strict_json(text), len(text)
        except ValueError as error:
            raise Unreachable(f"{self.url} answered no JSON") from error

    def _request_bytes(self, url_path: str, request_body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url.rstrip("/") + url_path, data=request_body, headers=headers)
        try:
            with _OPENER.open(request, timeout=self.seconds) as answer:
                return _read_within_limits(answer, time.monotonic() + _SLOWEST * self.seconds)
        except urllib.error.HTTPError as error:
            raise Unreachable(f"{self.url} refused with status {error.code}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.url} does not answer") from error


def _parse_base_facts(body: Any) -> KnowledgeBaseFacts:
    try:
        centre = torch.tensor([float(v) for v in body["centre"]])
        return KnowledgeBaseFacts(str(body["version"]), str(body["embedder"]), centre, int(body["samples"]))
    except MALFORMED as error:
        raise Unreachable("the server describes no knowledge base") from error
