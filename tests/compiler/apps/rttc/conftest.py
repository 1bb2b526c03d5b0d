"""A small world for test-time compute: a random model, a base of its own vectors, and a client over both."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effc.compiler.apps.rttc.adaptation import AdaptableModel, AdapterSettings
from effc.compiler.apps.rttc.app import read_app
from effc.compiler.apps.rttc.app_folder import NAME
from effc.compiler.apps.rttc.attachment import default_attachment_paths
from effc.compiler.apps.rttc.caching import StateCache
from effc.compiler.apps.rttc.embedder import model_embedder
from effc.compiler.apps.rttc.guided import GuidedModel, cache_identity
from effc.compiler.apps.rttc.knowledge import build_knowledge_base
from effc.compiler.apps.rttc.policy import Policy
from effc.compiler.apps.rttc.prompts import Prompts
from effc.compiler.apps.rttc.retrieval import Local
from effc.compiler.artifacts.manifest import file_sha256, readable_json_bytes
from transformers import AutoTokenizer, LlamaForCausalLM

from tests import worlds

COLOURS = ("red", "green", "blue", "white", "black", "brown", "grey", "pink")
THINGS = ("sky", "door", "house", "boat", "hill", "tree")
QUESTIONS = [f"Which colour has the {thing} {n}?" for thing in THINGS for n in range(4)]


def answer_of(question: str) -> str:
    return f"It is {COLOURS[sum(question.encode()) % len(COLOURS)]}."


@dataclass(frozen=True)
class World:
    folder: Path
    model: Any
    tokenizer: Any
    embedder: Any
    base: Any

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.tokenizer, self.model.config.max_position_embeddings)

    def adaptable(self, **regime) -> AdaptableModel:
        settings = {"rank": 4, "lr": 5e-3, "batch": 4, "epochs": 2, **regime}
        made = AdapterSettings(**settings)
        return AdaptableModel(
            self.model, self.tokenizer, default_attachment_paths(self.model, made.kind), made, self.prompts.question
        )

    def client(
        self, reward, policy: Policy, adaptable=None, retriever=None, near=(2.0, 2.0), folder=None
    ) -> GuidedModel:
        """`near`: thresholds of the two caches; nothing hits at 2."""
        shape = adaptable.shape if adaptable else ""
        identity = cache_identity("base", self.embedder.identity, self.base.version, shape)
        caches = [
            StateCache(identity, at, 1 << 20, folder=folder and folder / name)
            for at, name in zip(near, ("lists", "states"), strict=True)
        ]
        return GuidedModel(
            self.model, self.prompts, self.embedder, retriever or Local(self.base), reward, policy, *caches, adaptable
        )


@dataclass(frozen=True)
class Config:
    """A reward by rule: `table` by answer, else `otherwise`; a function of the answer alone."""

    otherwise: float = 0.0
    name: str = "told"
    scale: str = "told"

    def score(self, question, answers):
        return [self.otherwise for _ in answers]


def write_samples(file: Path, questions=QUESTIONS) -> Path:
    lines = [json.dumps({"question": q, "answer": answer_of(q)}) for q in questions]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def copied(app: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a folder of the target `rttc` with other settings: hashes of `app.json` are those of the copy."""
    shutil.copytree(app, folder)
    own = replace(read_app(folder), **changes)
    (folder / NAME).write_text(json.dumps(own.to_json()))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][NAME] = [(folder / NAME).stat().st_size, file_sha256(folder / NAME)]
    (folder / "manifest.json").write_bytes(readable_json_bytes(manifest))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rttc")
    worlds.tokenizer(folder, start=False)
    worlds.llama(folder, max_position_embeddings=320)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embedder = model_embedder(model, tokenizer, "world")
    base = build_knowledge_base([write_samples(folder / "kb.jsonl")], embedder, folder / "kb")
    return World(folder, model, tokenizer, embedder, base)
