"""The folder that runs: a client model with its knowledge base, reward, policy and thresholds.

    app.json          how they belong together; the thresholds were calibrated for these and no others
    knowledge/        samples.jsonl, vectors.safetensors, kb.json
    embedder/         a sentence encoder, where the model does not embed itself
    router.safetensors    where the policy is a router
    reward/           a trained scorer or a judge, where the model does not judge itself
    calibration.json  what the dev set showed: answers, areas under the curve, the curve of thresholds

The model lies beside them in a form of the target `hf`, and opens as one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...dsl.diagnostics import Fault, Reject
from ..artifacts.reft import base_hash
from ..store.regular import CONFIG, MISFIT, read_json
from .adaptation import Adaptable, Regime
from .attachment import KINDS, places_of
from .caching import StateCache
from .embedder import Embedder, folder_embedder, own_embedder
from .guided import Guided, identity_of
from .knowledge import check_embedder, open_base
from .policy import Policy, read_policy
from .prompts import Prompts
from .retrieval import Local, Remote, Retriever
from .reward import Judge, Reward, SelfLikelihood
from .router import open_router
from .scorer import open_scorer
from .selection import SELECTIONS

FORMAT, NAME = 1, "app.json"
KNOWLEDGE, EMBEDDER, REWARD = "knowledge", "embedder", "reward"
REWARDS = ("self", "scorer", "judge")

broken_app = Fault(
    "broken-app", "The description of a test-time compute folder is not what effc writes.", exit="environment"
)


@dataclass(frozen=True)
class App:
    """
    reward     "self", "scorer" or "judge"
    embed      "own" or "folder"
    near       cosines from which the caches hit, by cache: "lists" and "states"
    bytes      that each cache may hold
    adapters   whether the model may be trained while it answers
    """

    policy: Policy
    regime: Regime
    reward: str
    embed: str
    near: Mapping[str, float]
    selection: str = "diverse"
    bytes: int = 64 << 20
    adapters: bool = True

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "near": dict(self.near)}


def read_app(folder: Path) -> App:
    try:
        body = read_json(folder / NAME, CONFIG)
        if body.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        policy, regime = read_policy(json.dumps(body.pop("policy")).encode()), Regime(**body.pop("regime"))
        app = App(policy=policy, regime=regime, **body)
        numbers = all(isinstance(value, (int, float)) for name, value in asdict(regime).items() if name != "kind")
        fits = (
            app.reward in REWARDS,
            app.embed in ("own", "folder"),
            app.selection in SELECTIONS,
            type(app.bytes) is int and 0 <= app.bytes < 2**40,
            type(app.adapters) is bool,
            all(isinstance(app.near[name], (int, float)) for name in ("lists", "states")),
            regime.kind in KINDS,
            numbers and 1 <= regime.rank <= 256,
            1 <= regime.batch <= 64,
            1 <= regime.epochs <= 16,
            2 <= regime.length <= 4096,
            0 <= regime.seconds <= 600,
        )
        if not all(fits):
            raise ValueError("a field has another form, or is out of its range")
        return app
    except (OSError, *MISFIT) as error:
        raise Reject(broken_app(f"{folder / NAME} can't be read: {error}", help="emit the folder again")) from error


def is_app(place: str) -> bool:
    return (Path(place) / NAME).is_file()


def embedder_of(app: App, folder: Path, model: Any, tokenizer: Any, cache_dir: Path) -> Embedder:
    if app.embed == "folder":
        return folder_embedder(folder / EMBEDDER, cache_dir)
    return own_embedder(model, tokenizer, base_hash(model))


def reward_of(app: App, folder: Path, model: Any, prompts: Prompts, embedder: Embedder) -> Reward:
    if app.reward == "scorer":
        return open_scorer(folder / REWARD, embedder)
    if app.reward == "judge":
        return Judge(folder / REWARD)
    return SelfLikelihood(model, prompts)


def prompts_of(model: Any, tokenizer: Any) -> Prompts:
    return Prompts(tokenizer, getattr(model.config, "max_position_embeddings", None) or 1 << 20)


def client_of(
    app: App, folder: Path, model: Any, tokenizer: Any, cache_dir: Path, server: Remote | None = None
) -> Guided:
    """A client over the parts of a folder. Its caches lie in `cache_dir`, by what they belong to.

    server   asked for samples in place of the folder's own base
    """
    prompts = prompts_of(model, tokenizer)
    embedder = embedder_of(app, folder, model, tokenizer, cache_dir)
    retriever: Retriever
    if server is None:
        base = open_base(folder / KNOWLEDGE).searched_by("auto")
        check_embedder(base, embedder)
        retriever, version = Local(base, app.selection), base.version
    else:
        retriever, version = server, server.url
    reward = reward_of(app, folder, model, prompts, embedder)
    weights = base_hash(model)
    adaptable = None
    if app.adapters:
        places = places_of(model, app.regime.kind)
        adaptable = Adaptable(model, tokenizer, places, app.regime, prompts.question)
    identity = identity_of(weights, embedder.identity, version, adaptable.shape if adaptable else "")
    lists, states = (
        StateCache(identity, app.near[name], app.bytes, folder=cache_dir / "rttc" / identity[:32] / name)
        for name in ("lists", "states")
    )
    router = open_router(folder, embedder.width) if app.policy.kind == "router" else None
    return Guided(model, prompts, embedder, retriever, reward, app.policy, lists, states, adaptable, router)
