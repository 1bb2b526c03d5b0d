"""A client and a server that answer with test-time compute, guided by a reward."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .....dsl.checker.rules import Conflict, Problem
from .....dsl.checker.values import Bytes
from .....dsl.syntax.diagnostics import Fault, Reject
from ....artifacts.artifact import NOTES
from ....artifacts.checkpoint_folders import CheckpointTarget
from ....ir.program import Program
from ....plugin.context import Context
from ....plugin.interfaces import param
from ....plugin.target import Form, RunRequest
from ....targets.hf import FORMS, Hf
from ....targets.native import FOLDER, Native

if TYPE_CHECKING:
    from torch import Tensor

no_questions = Fault(
    "no-dev-questions",
    "A policy that stops at good answers was asked for without dev questions.\n\n"
    "How large a reward is large enough belongs to the model, the reward and the domain: it is "
    "calibrated on questions with known answers.",
)


class Rttc(CheckpointTarget):
    """A client and a server that answer with test-time compute, guided by a reward.

    Each query is answered directly, with samples of a knowledge base in the prompt (`rag`), or after a short training
    of low-rank adapters on them (`ttt`), whatever the reward of the answer so far asks for. `effc run` talks to the
    folder, `effc serve` answers OpenAI's API (`--role client`) or gives samples to clients (`--role server`). The
    thresholds are calibrated here on the questions of `dev`: the largest accuracy less `price` for each second.

    Source: reward-guided test-time compute with query-state caching; training as in arXiv 2411.07279, samples chosen
    as in arXiv 2410.08020.
    Example: rttc("client", knowledge: "kb.jsonl", policy: rag)
    """

    loads = {
        "compact": '`compact/` is the client\'s model: `effc.load(".")`; `effc run .` and `effc serve .` use all.',
        "model": "`model/` is the client's model, an ordinary checkpoint; `effc run .` and `effc serve .` use all.",
        "compat": "`compat/` is the same, filled with zeros for plain transformers.",
    }
    does = {
        "knowledge": "samples are put into prompts, and `effc run` and `serve` may train adapters on them",
        "embedder": "transformers builds a sentence encoder and maps its safetensors",
        "reward": "a small reward model scores answers",
    }
    extra = "rttc"
    requires = ("peft",)
    reads = {
        "knowledge": ("file",),
        "dev": ("file",),
        "graded": ("file",),
        "embed": ("folder", "own"),
        "reward": ("folder", "self", "scorer"),
    }

    knowledge: str = param("Samples: JSON lines with `question` and `answer`, or `text`; or a text, by paragraphs.")
    policy: Literal["sequential", "best", "router", "direct", "rag", "ttt"] = param(
        "Stop at the first answer that is good enough, make all three and take the best, predict one branch before "
        "anything is generated, or always the same branch.",
        default="sequential",
    )
    dev: str = param("Questions with answers, JSON lines, that thresholds are calibrated on.", default="")
    check: Literal["exact", "number", "choice", "pattern"] = param(
        "How an answer to a dev question is compared with the right one.", default="exact"
    )
    options: tuple[str, ...] = param("The words that a `choice` chooses from.", default=())
    embed: str = param(
        "Folder of a sentence encoder (MiniLM and its kin); `own` uses the model's own states.", default="own"
    )
    reward: str = param(
        "`self` is the model's likelihood, `scorer` is trained from `graded`, else a folder with a "
        "classifier of one logit.",
        default="self",
    )
    graded: str = param("Answers with `question`, `answer` and `right`, JSON lines, to train a scorer on.", default="")
    scorer: Literal["head", "lora", "reft"] = param(
        "What of a `scorer` is trained: a linear head over the vectors of question and answer, or adapters on the "
        "encoder too, which then reads both together.",
        default="head",
    )
    adapt: Literal["lora", "reft", "none"] = param(
        "What is trained while answering: low-rank adapters, interventions at every position (cached states are a "
        "tenth as large), or nothing.",
        default="lora",
    )
    rank: int = param("Of the adapters.", default=8, ge=1, le=256)
    epochs: int = param("Times that the samples of a query are gone over.", default=2, ge=1, le=16)
    lr: float = param("Learning rate of AdamW.", default=5e-4, gt=0, le=1)
    batch: int = param("Samples of a step of training.", default=4, ge=1, le=64)
    learn: Literal["samples", "answers"] = param(
        "What is learned: whole samples, or their answers alone, given the questions.", default="samples"
    )
    seconds: float = param("After which no step of a query's training is begun.", default=60.0, ge=0, le=600)
    count: int = param("Samples for a query.", default=8, ge=1, le=256)
    shown: int = param("Of them in the prompt of a `rag` answer, at most.", default=4, ge=1, le=256)
    selection: Literal["diverse", "nearest"] = param("How samples are chosen.", default="diverse")
    generation: Literal["auto", "native", "torch"] = param(
        "What generates: the native engine, PyTorch, or the engine where the model allows it. Training is PyTorch's.",
        default="auto",
    )
    evict: Literal["lfu", "lru"] = param(
        "What leaves a full cache: what hit least often, the oldest of equals, or what did not hit for longest.",
        default="lfu",
    )
    lists: Bytes = param("That cached lists of samples may take.", default=Bytes(67_108_864), ge=0)
    states: Bytes = param("That cached adapters may take.", default=Bytes(67_108_864), ge=0)
    price: float | None = param(
        "Accuracy that a second is worth, for the calibration. Unless given, thresholds ask for accuracy alone, and a "
        "router takes no longer than the better of always `rag` and always `ttt`.",
        default=None,
        ge=0,
    )
    length: int = param("Most tokens of an answer in the calibration.", default=32, ge=1, le=4096)
    force: bool = param("Take a reward that tells right from wrong no better than a coin.", default=False)

    def problems(self) -> Iterator[Problem]:
        if self.policy in ("sequential", "router") and not self.dev:
            yield Conflict(
                ("policy", "dev"),
                "`sequential` and `router` learn from `dev`, and there is none",
                'give `dev: "dev.jsonl"`',
            )
        if self.policy == "ttt" and self.adapt == "none":
            yield Conflict(
                ("policy", "adapt"), "`adapt: none` leaves nothing to train for `policy: ttt`", "take `adapt: lora`"
            )
        if self.check == "choice" and len(self.options) < 2:
            yield Conflict(
                ("check", "options"), "`check: choice` has fewer than two words", 'name them: `options: ["yes", "no"]`'
            )
        if self.scorer in ("lora", "reft") and self.embed == "own":
            yield Conflict(
                ("scorer", "embed"),
                "`lora` and `reft` train a sentence encoder, and there is none",
                'name one: `embed: "./minilm"`',
            )
        if self.reward == "scorer" and not self.graded:
            yield Conflict(
                ("reward", "graded"),
                "the scorer has nothing to learn from without `graded`",
                'give `graded: "graded.jsonl"`',
            )

    def cannot_hold(self) -> Mapping[str, str]:
        return {
            "packed weights": "kernels of packed weights can't be trained through",
            "pruned caches": "adapters are trained through a plain cache",
            "interventions": "adapters go onto a model without interventions",
        }

    def foresee(self, ctx: Context) -> None:
        if self.generation == "native":
            Native(path=self.path).foresee(ctx)

    def check_requirements(self, ctx: Context) -> None:
        from ..sample import read_samples
        from ..scorer import read_labelled_answers

        for _ in read_samples(ctx.folder / self.knowledge):
            pass
        self._read_dev_samples(ctx)
        if self.reward == "scorer":
            read_labelled_answers(ctx.folder / self.graded)
        for _, folder_name, fault in self._companion_models():
            if not (ctx.folder / folder_name / "config.json").is_file():
                raise fault(f"there is no model folder {ctx.folder / folder_name}").rejection()

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        from ....core.cache import write_atomic
        from ..app import KNOWLEDGE, App, embedder_of
        from ..app_folder import NAME
        from ..calibration import cache_hit_thresholds

        Hf(path=self.path).emit(program, destination, ctx)
        model, tokenizer, cache = program.model, ctx.tokenizer, ctx.settings.cache_dir
        app = App(
            self._policy(),
            self._adapter_settings(ctx),
            self._reward_kind(),
            "own" if self.embed == "own" else "folder",
            {},
            self.selection,
            bytes={"lists": self.lists.value, "states": self.states.value},
            evict=self.evict,
            adapters=self.adapt != "none",
        )
        self._copy_companion_models(destination, ctx)
        embedder = embedder_of(app, destination, model, tokenizer, cache)
        base = self._build_base(destination / KNOWLEDGE, embedder, ctx)
        self._train_and_save_scorer(destination, embedder, ctx)
        app = replace(app, near=cache_hit_thresholds(base.vectors, ctx.seed))
        app = replace(
            app, engine=self._write_native_engine_or_note(app, program, destination, base.samples[0].subject, ctx)
        )
        if self.dev:
            app = self._app_with_calibrated_policy(app, destination, model, tokenizer, ctx)
        for note in [*self._usage_lines(), *_dropped_samples_note(base)]:
            _append_note(destination, note)
        write_atomic(destination / NAME, (json.dumps(app.to_json(), indent=2, sort_keys=True) + "\n").encode())

    @classmethod
    def check_artifact(cls, artifact: Path, cache_folder: Path) -> None:
        from ..app import KNOWLEDGE, read_app
        from ..knowledge import open_knowledge_base

        read_app(artifact)
        open_knowledge_base(artifact / KNOWLEDGE)
        if (artifact / FOLDER).is_dir():
            Native.check_folder(artifact / FOLDER)

    @classmethod
    def tensors(cls, file: Path) -> "Iterator[tuple[str, Tensor]]":
        return Native.tensors(file)

    @classmethod
    def run(cls, request: RunRequest) -> bool:
        from ..conversation import answer_prompt_or_lines

        answer_prompt_or_lines(request)
        return True

    def forms(self) -> tuple[Form, ...]:
        return (*FORMS, *Native(path=self.path).forms())

    def _write_native_engine_or_note(
        self, app: Any, program: Program, destination: Path, probe_question: str, ctx: Context
    ) -> Literal["torch", "native", "adapted"]:
        """Write the engine's folder, and say what generates; why it is not the engine goes into the notes."""
        from ....runtimes.native.refusal import cannot_run_natively
        from ..app import choose_engine_and_limitation

        if self.generation == "torch":
            return "torch"
        try:
            Native(path=self.path).emit(program, destination, ctx)
        except Reject as rejection:
            if self.generation == "native" or rejection.diagnostics[0].fault != cannot_run_natively:
                raise
            shutil.rmtree(destination / FOLDER)
            _append_note(destination, f"PyTorch answers, not the native engine: {rejection.diagnostics[0].message}.")
            return "torch"
        engine, reason = choose_engine_and_limitation(destination, program.model, ctx.tokenizer, app, probe_question)
        if reason:
            _append_note(destination, f"Answers after a training come from PyTorch, not the native engine: {reason}.")
        return engine

    def _usage_lines(self) -> list[str]:
        """Commands that use the folder, for its model card."""
        commands = [
            '`effc run . --prompt "..." --explain` answers, and says which way, why, and what it took.',
            '`effc serve .` answers OpenAI\'s API at http://127.0.0.1:8000/v1 (`pip install "effc[rttc]"`).',
            "`effc serve . --role server --host 0.0.0.0 --port 9000 --api-key KEY` gives samples to other machines; "
            "there `EFFC_KNOWLEDGE_KEY=KEY effc serve . --knowledge http://HOST:9000` answers. It sends the vectors of "
            "questions alone.",
        ]
        curve_line = (
            "`calibration.txt` and `calibration.svg` draw what the dev questions showed, `calibration.json` has all."
        )
        return [*commands, curve_line] if self.dev else commands

    def _reward_kind(self) -> Literal["self", "scorer", "judge"]:
        return "self" if self.reward == "self" else "scorer" if self.reward == "scorer" else "judge"

    def _policy(self) -> Any:
        from ..policy import Policy

        return Policy(self.policy, count=self.count, shown=min(self.shown, self.count))

    def _adapter_settings(self, ctx: Context) -> Any:
        from ..adaptation import AdapterSettings

        return AdapterSettings(
            rank=self.rank,
            alpha=2.0 * self.rank,
            lr=self.lr,
            batch=self.batch,
            epochs=self.epochs,
            answers=self.learn == "answers",
            seconds=self.seconds,
            seed=ctx.seed,
            kind="reft" if self.adapt == "reft" else "lora",
        )

    def _companion_models(self) -> list[tuple[str, str, Fault]]:
        """Models that travel with the folder: where to, where from, and what it is called where there is none."""
        from ..app import EMBEDDER, REWARD
        from ..embedder import no_embedder
        from ..reward import no_judge

        embedder = [] if self.embed == "own" else [(EMBEDDER, self.embed, no_embedder)]
        return embedder + ([(REWARD, self.reward, no_judge)] if self._reward_kind() == "judge" else [])

    def _copy_companion_models(self, destination: Path, ctx: Context) -> None:
        for name, folder_name, _ in self._companion_models():
            shutil.copytree(
                ctx.folder / folder_name, destination / name, ignore=shutil.ignore_patterns(".*", "*.py", "*.bin")
            )

    def _build_base(self, folder: Path, embedder: Any, ctx: Context) -> Any:
        from ....core.events import Ticked
        from ..knowledge import build_knowledge_base

        guard = [sample.question for sample in self._read_dev_samples(ctx)]
        return build_knowledge_base(
            [ctx.folder / self.knowledge],
            embedder,
            folder,
            evaluation_questions=guard,
            draft_folder=ctx.settings.cache_dir
            / "rttc"
            / "building",  # what is beside the folder goes with a killed compile
            on_progress=lambda at, of: ctx.tick(Ticked("embedding samples", at, of)),
        )

    def _read_dev_samples(self, ctx: Context) -> Sequence[Any]:
        from ..sample import read_samples

        samples = [s for s in read_samples(ctx.folder / self.dev) if s.question] if self.dev else []
        if self.dev and not samples:
            raise no_questions(f"{self.dev} has no question with an answer").rejection()
        return samples

    def _train_and_save_scorer(self, destination: Path, embedder: Any, ctx: Context) -> None:
        from ....core.events import Ticked
        from ..app import REWARD
        from ..scorer import read_labelled_answers, train_logistic_scorer
        from ..tuned_scorer import train_fine_tuned_scorer

        if self.reward == "scorer":
            graded = read_labelled_answers(ctx.folder / self.graded)
            if self.scorer == "head":
                scorer: Any = train_logistic_scorer(graded, embedder, seed=ctx.seed, force=self.force)
            else:

                def report(done: int, total: int) -> None:
                    ctx.tick(Ticked("training the scorer", done, total))

                scorer = train_fine_tuned_scorer(
                    graded, embedder, self.scorer, on_progress=report, seed=ctx.seed, force=self.force
                )
            scorer.save(destination / REWARD)
            ctx.record("AUC of the scorer", scorer.auc)

    def _app_with_calibrated_policy(self, app: Any, destination: Path, model: Any, tokenizer: Any, ctx: Context) -> Any:
        """With the thresholds, or the router, of the dev questions; what they showed goes into files of its own."""
        from ..app import open_guided_client
        from ..calibration import calibrate_on_trials, run_all_branches
        from ..generation import Settings
        from ..reward import Verifier

        questions = self._read_dev_samples(ctx)
        best_policy = replace(app.policy, kind="best")  # a router is not there yet
        off = replace(
            app, policy=best_policy, near={"lists": 2.0, "states": 2.0}, bytes=dict.fromkeys(("lists", "states"), 0)
        )  # every question on its own
        client = open_guided_client(off, destination, model, tokenizer, ctx.workdir)
        verifier = Verifier(self.check, {s.question: s.answer for s in questions}, self.options)
        try:
            tracked = ctx.each(questions, "calibrating", len(questions))
            trials_run = run_all_branches(client, tracked, verifier, Settings(max_tokens=self.length, seed=ctx.seed))
            calibration = calibrate_on_trials(
                client, app.policy, questions, trials_run, self.price, ctx.seed, self.force
            )
        finally:
            if client.adaptable is not None:
                client.adaptable.close()
        ctx.record("AUC of the reward", calibration.auc["all"])
        if calibration.router is not None:
            ctx.record("AUC of the router", calibration.router.auc)
        calibration.write(destination, client.reward)
        return replace(app, policy=calibration.policy)


def _dropped_samples_note(base: Any) -> list[str]:
    if not base.dropped:
        return []
    return [f"Of the samples {base.dropped} ask a dev question, or come near one, and were left out of the base."]


def _append_note(destination: Path, note: str) -> None:
    """One more sentence for the model card."""
    notes = json.loads((destination / NOTES).read_bytes()) if (destination / NOTES).exists() else []
    (destination / NOTES).write_text(json.dumps([*notes, note]), encoding="utf-8")
