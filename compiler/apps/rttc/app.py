"""The folder that runs: a client model with its knowledge base, reward, policy and thresholds.

    app.json          how they belong together; the thresholds were calibrated for these and no others
    knowledge/        samples.jsonl, vectors.safetensors, kb.json
    embedder/         a sentence encoder, where the model does not embed itself
    router.safetensors    where the policy is a router
    reward/           a trained scorer or a judge, where the model does not judge itself
    native/           the model as the native engine runs it, where it answers
    calibration.json  what the dev set showed: answers, areas under the curve, the curve of thresholds

The model lies beside them in a form of the target `hf`, and opens as one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ....dsl.syntax.diagnostics import Fault, Reject
from ....dsl.syntax.json_types import from_json, make_range_predicate
from ...artifacts.manifest import hash_files
from ...core.cache import canonical_json_sha256
from ...core.json_errors import reject_on_error
from ...core.safe_read import CONFIG, read_json
from ...ir.weights import model_weights_hash
from ...runtimes.native.adapters import unsupported_adapter
from .adaptation import AdaptableModel, AdapterSettings
from .app_folder import NAME
from .attachment import default_attachment_paths
from .caching import Eviction, StateCache
from .embedder import Embedder, MeanPooledEncoder, model_embedder, open_folder_embedder
from .guided import GuidedModel, cache_identity
from .knowledge import open_knowledge_base, refuse_other_embedder
from .native_generator import MAX_ERROR, NativeGenerator, open_native_generator, relative_logit_error
from .policy import Policy
from .prompts import Prompts
from .retrieval import Local, RemoteRetriever, Retriever
from .reward import Judge, Reward, SelfLikelihood
from .router import open_router
from .scorer import NAME as SCORER
from .scorer import open_scorer
from .tuned_scorer import open_tuned_scorer

FORMAT = 1
KNOWLEDGE, EMBEDDER, REWARD, NATIVE = "knowledge", "embedder", "reward", "native"
CACHES = ("lists", "states")
Engine = Literal["torch", "native", "adapted"]
CacheBytes = Annotated[int, make_range_predicate(0, 2**40 - 1)]

broken_app = Fault(
    "broken-app", "The description of a test-time compute folder is not what effc writes.", exit="environment"
)


@dataclass(frozen=True)
class App:
    """
    reward     "self", "scorer" or "judge"
    embed      "own" or "folder"
    near       cosines from which the caches hit, by cache: "lists" and "states"
    bytes      that each cache may hold, and `evict` what leaves one that is full
    adapters   whether the model may be trained while it answers
    engine     what generates: "torch"; "native" for answers without adapters alone; "adapted" for all
    """

    policy: Policy
    regime: AdapterSettings
    reward: Literal["self", "scorer", "judge"]
    embed: Literal["own", "folder"]
    near: Mapping[str, float]
    selection: Literal["nearest", "diverse"] = "diverse"
    bytes: Mapping[str, CacheBytes] = field(default_factory=lambda: {"lists": 64 << 20, "states": 64 << 20})
    evict: Eviction = "lfu"
    adapters: bool = True
    engine: Engine = "torch"

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "near": dict(self.near), "bytes": dict(self.bytes)}


def read_app(folder: Path) -> App:
    with reject_on_error(broken_app, f"{folder / NAME} can't be read", "emit the folder again"):
        body = read_json(folder / NAME, CONFIG)
        if body.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if type(body.get("bytes")) is int:  # as folders were written that had one size for both
            body["bytes"] = dict.fromkeys(CACHES, body["bytes"])
        app = from_json(body, App)
        if app.policy.shown > app.policy.count:
            raise ValueError(f"{app.policy.shown} samples are shown of {app.policy.count}")
        if not app.near.keys() == app.bytes.keys() == set(CACHES):
            raise ValueError(f"`near` and `bytes` are of {' and '.join(CACHES)}")
        return app


def choose_engine_and_limitation(
    folder: Path, model: Any, tokenizer: Any, app: App, probe_question: str
) -> tuple[Engine, str]:
    """Engine that generates for a folder, and why it can't do all; "" where it can.

    probe_question   a question to compare the engine's and PyTorch's adapted logits on
    """
    if not app.adapters:
        return "native", ""
    prompts = prompts_of(model, tokenizer)
    adaptable = AdaptableModel(
        model, tokenizer, default_attachment_paths(model, app.regime.kind), app.regime, prompts.question
    )
    try:
        ids = prompts.question(probe_question)[: prompts.context]  # a sample may be a whole page
        off = relative_logit_error(open_native_generator(folder / NATIVE, adaptable), adaptable, ids)
    except Reject as rejection:
        if rejection.diagnostics[0].fault != unsupported_adapter:
            raise
        return "native", rejection.diagnostics[0].message
    finally:
        adaptable.close()
    if not off <= MAX_ERROR:
        return "native", f"the engine's adapted logits are off by {off:.2f} of root mean squares"
    return "adapted", ""


def embedder_of(app: App, folder: Path, model: Any, tokenizer: Any, cache_dir: Path) -> Embedder:
    if app.embed == "folder":
        return open_folder_embedder(folder / EMBEDDER, cache_dir)
    return model_embedder(model, tokenizer, model_weights_hash(model))


def reward_of(app: App, folder: Path, model: Any, prompts: Prompts, embedder: Embedder) -> Reward:
    if app.reward == "scorer":
        return open_encoder_reward(folder, embedder)
    if app.reward == "judge":
        return Judge(folder / REWARD)
    return SelfLikelihood(model, prompts)


def open_encoder_reward(folder: Path, embedder: Embedder) -> Reward:
    """A head over the embedder's vectors, or adapters on the embedder."""
    scorer_facts = read_json(folder / REWARD / SCORER, CONFIG) if (folder / REWARD / SCORER).is_file() else {}
    if isinstance(scorer_facts, dict) and "kind" in scorer_facts:
        assert isinstance(embedder, MeanPooledEncoder), "an encoder in a folder is one"
        return open_tuned_scorer(folder / REWARD, embedder)
    return open_scorer(folder / REWARD, embedder)


def prompts_of(model: Any, tokenizer: Any) -> Prompts:
    return Prompts(tokenizer, getattr(model.config, "max_position_embeddings", None) or 1 << 20)


def open_guided_client(
    app: App, folder: Path, model: Any, tokenizer: Any, cache_dir: Path, remote: RemoteRetriever | None = None
) -> GuidedModel:
    """A client over the parts of a folder. Its caches lie in `cache_dir`, by what they belong to.

    remote   asked for samples in place of the folder's own base
    """
    prompts = prompts_of(model, tokenizer)
    embedder = embedder_of(app, folder, model, tokenizer, cache_dir)
    retriever: Retriever
    if remote is None:
        base = open_knowledge_base(folder / KNOWLEDGE).with_search_engine("auto")
        refuse_other_embedder(base, embedder)
        retriever, version = Local(base, app.selection), base.version
    else:
        retriever, version = remote, remote.url
    adaptable = None
    if app.adapters:
        sites = default_attachment_paths(model, app.regime.kind)
        adaptable = AdaptableModel(model, tokenizer, sites, app.regime, prompts.question)
    generator = open_generator_of_app(app, folder, adaptable)
    reward = reward_of(app, folder, generator.bare if generator else model, prompts, embedder)
    parts = canonical_json_sha256([hash_files(folder), app.to_json()])
    identity = cache_identity(parts, embedder.identity, version, adaptable.shape if adaptable else "")
    lists, states = (
        StateCache(identity, app.near[name], app.bytes[name], app.evict, cache_dir / "rttc" / identity[:32] / name)
        for name in CACHES
    )
    router = open_router(folder, embedder.width) if app.policy.kind == "router" else None
    return GuidedModel(
        model, prompts, embedder, retriever, reward, app.policy, lists, states, adaptable, router, generator
    )


def open_generator_of_app(app: App, folder: Path, adaptable: AdaptableModel | None) -> NativeGenerator | None:
    """The engine of a folder, where it answers."""
    if app.engine == "torch":
        return None
    return open_native_generator(folder / NATIVE, adaptable if app.engine == "adapted" else None)
