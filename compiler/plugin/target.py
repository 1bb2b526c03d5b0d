"""Interface of targets: the forms of an artifact, and what the command line does with one."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ...dsl.syntax.diagnostics import Fault
from .interfaces import Plugin, param

if TYPE_CHECKING:
    import torch

    from ...dsl.checker.skeleton import Skeleton
    from ...dsl.syntax.diagnostics import Diagnostic
    from ..core.settings import Settings
    from ..ir.outcome import Outcome
    from ..ir.program import Program
    from .context import Context
    from .interfaces import Pass
    from .weight_sizes import Weights

unchecked_form = Fault(
    "unchecked-form",
    "The target of an artifact has no rules for a folder that it loads.\n\n"
    "A folder that may come from anybody is read by rules before it is trusted: a target that `loads` folders has a "
    "method `check_folder`, which reads one without making a model of it.",
    exit="environment",
)

prompt_not_utf8 = Fault(
    "prompt-not-utf-8", "A prompt is text in an encoding other than UTF-8, or no text.", exit="usage"
)


@dataclass(frozen=True)
class Form:
    """A folder of an artifact that a fresh process reopens, to compare what it computes with the model in memory.

    folder      below the artifact; where there is none nothing is checked
    member      of the outcome that it holds, which it is compared with
    opens       name of a file in compiler/artifacts/openers: "effc" and "engine" open it by the target's own `open`,
                "plain" by transformers alone; or the path of such a file, which comes with the target
    padded      zeros fill it up, which changes the order of sums
    rounds      where numbers are rounded coarsely: model -> how far logits may be off, as a share of root mean
                squares, since the largest of many thousand errors says little; else their dtype says it, of the largest
    as_stored   (model, folder) -> context in which the model has the weights that the folder holds, rounded as they
                are: what a form computes is compared with that, where the original says little of it
    routes      folder -> whether experts are chosen in it: of what rounds, some tokens then meet others
    reason      for that share
    loses       name of what the format loses by design, "" where it rounds as little as its dtype or `rounds` say: a
                fresh process is compared with the folder as this process opens it, and the loss is reported
    generates   whether it continues prompts, where the model does
    steps       how many greedy tokens it is asked for
    """

    folder: str
    opens: str
    padded: bool = False
    rounds: "Callable[[torch.nn.Module], float] | None" = None
    as_stored: "Callable[[torch.nn.Module, Path], AbstractContextManager[None]] | None" = None
    routes: Callable[[Path], bool] = lambda folder: False
    reason: str = ""
    loses: str = ""
    generates: bool = True
    member: str = ""
    steps: int = 8


@dataclass(frozen=True)
class LoadRequest:
    """Options of a caller of `effc.load`; see there."""

    dtype: "torch.dtype | None" = None
    device: Any = None
    base: Any = None
    threads: int | None = None
    max_sequences: int | None = None
    batch_invariant: bool = False
    kernels: bool = True
    mapped: bool | None = None


class Screen(Protocol):
    """Output of the command line, in `format` "text" or "json"; names and texts in it may come from anybody."""

    @property
    def format(self) -> str: ...

    def answer(self, text: str) -> None: ...

    def answer_json(self, verb: str, **body: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def complain(self, diagnostics: "Sequence[Diagnostic]", verb: str) -> None: ...


@dataclass(frozen=True)
class RunRequest:
    """Arguments of `effc run`.

    artifact      its folder
    settings      of the run; their seed draws tokens
    prompt        None where a person writes lines, or a pipe brings the text
    knowledge     URL of a server of samples
    explain       say how it came to an answer
    speculation   the native engine verifies drafts of a prompt's n-grams
    """

    artifact: Path
    screen: Screen
    settings: "Settings"
    prompt: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    knowledge: str | None = None
    explain: bool = False
    speculation: bool = False

    def text(self) -> str | None:
        """The prompt, or all of a pipe; None where a person writes."""
        if self.prompt is None and not sys.stdin.isatty():
            return read_utf8_prompt(sys.stdin.read, "the text of the pipe").rstrip("\n")
        return self.prompt


def read_utf8_prompt(read: Callable[[], str], label: str) -> str:
    """The text that `read` takes from stdin. Raises Reject where its bytes are none of UTF-8."""
    try:
        text = read()
        text.encode()  # fails on bytes that Python has kept as lone surrogates
    except UnicodeError as error:
        raise prompt_not_utf8(f"{label} is not UTF-8", help="a prompt is text").rejection() from error
    return text


class ArtifactSummary(Protocol):
    """Content of a folder, for people and for programs."""

    def to_text(self) -> str: ...

    def to_json(self) -> Any: ...


class Target(Plugin):
    """Writes files, nothing else: the compiler hashes them, writes the manifest and renames the folder.

    loads          {folder: sentence}: what `effc.load` opens, the best first, and how the model card says it is opened
    marks          {folder: file} by which such a folder is known, where that is not config.json; or one of several,
                   with spaces between
    does           {folder: sentence}: what becomes of each folder that it writes, for `effc doctor --trust`; folders
                   of another target's name have its sentence
    checksummed_files  names of files whose content `open` compares by checksums of its own, so that loading hashes
                   all others alone
    upon           it holds no model of its own: a caller may name the one that it goes onto
    on_cpu         what it writes is computed by an engine of the CPU, whatever device a compile is on
    describes_artifacts  it writes one file about the pipeline's artifacts, after them, which is none itself
    use            what to do with an artifact that holds no model to load
    result_kinds   kinds of results that it can write: "model", "adapters", "front"
    formats        what `effc tune` tries: arguments, the steps that belong before them (`{data}` stands for rows), and
                   the format of `lower.sparse_cpu` that packs zeros beside them, "" where none does
    later          why bounds that are `in` it can't be judged when it is written: it has to be run first
    """

    loads: ClassVar[dict[str, str]] = {}
    marks: ClassVar[dict[str, str]] = {}
    does: ClassVar[dict[str, str]] = {}
    checksummed_files: ClassVar[tuple[str, ...]] = ()
    upon: ClassVar[bool] = False
    on_cpu: ClassVar[bool] = False
    describes_artifacts: ClassVar[bool] = False
    use: ClassVar[str] = ""
    result_kinds: ClassVar[tuple[str, ...]] = ("model",)
    formats: ClassVar[tuple[tuple[dict[str, Any], tuple[str, ...], str], ...]] = ()
    later: ClassVar[str] = ""

    path: str = param("Folder or file of the artifact, relative to the output folder.", positional=True)

    def weight_bytes(self, weights: "Weights") -> int:
        """Bytes of a planned model's weights as it stores them, which the metric `bytes` counts in its artifact."""
        return weights.stored(lambda weight: weight.numel * weights.itemsize)

    def files(self, weights: "Weights") -> tuple[int, dict[str, float]]:
        """Bytes of the files that it writes of a planned model, and how long making them takes, as `Effort.work`."""
        return self.weight_bytes(weights) + weights.sidecars, {}

    def write(self, outcome: "Outcome", destination: Path, ctx: "Context") -> None:
        """Write the artifact's files into an empty folder; a target that holds more than models says how."""
        for _, program in outcome.members():
            self.emit(program, destination, ctx)

    def emit(self, program: "Program", destination: Path, ctx: "Context") -> None:
        """Write a model's files into an empty folder."""
        raise AssertionError(f"{type(self).__name__} holds no model")

    def write_about(self, reports: Sequence[Any], file: Path) -> None:
        """Write the file of a target that describes artifacts; `reports` has a `ReportData` for each of them."""
        raise AssertionError(f"{type(self).__name__} tells nothing of others")

    def context_tokens(self) -> int | None:
        """Tokens that its artifact continues at most; None where the model decides."""
        return None

    def check_requirements(self, ctx: "Context") -> None:
        """Raise Reject for what no step changes, such as the model's architecture: asked before passes run."""

    def foresee(self, ctx: "Context") -> None:
        """Raise Reject where it could not write the recipe's model as it is, whatever its weights: asked before passes
        run, and only a warning where a step may remove modules."""

    def foresee_shapes(self, skeleton: "Skeleton", ctx: "Context") -> None:
        """Raise Reject where it could not write a model of the shapes that a plan forecasts of its steps."""

    def lacks(self, earlier_passes: "Sequence[Pass]") -> "Diagnostic | None":
        """Diagnostic for a requirement that no earlier pass meets, unless the weights already do."""
        return None

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> "tuple[torch.nn.Module, Mapping[str, str] | None]":
        """The model in one of the folders that it `loads`, and the versions that wrote it where the folder says so."""
        raise AssertionError(f"{cls.__name__} holds no model to load")

    @classmethod
    def stored_bytes(cls, folder: Path) -> int | None:
        """Bytes of the weights in such a folder, where the model that `open` gives holds them in another form."""
        return None

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        """Raise Reject where one of the folders that it `loads` holds what `open` would refuse.

        The folder may come from anybody: nothing of it is run, and no model is made with its weights.
        """
        raise unchecked_form(
            f"{folder} is of a target without rules for it: {cls.__name__} has no `check_folder`",
            help="ask for an artifact of another target, or its author for a newer version",
        ).rejection()

    @classmethod
    def check_artifact(cls, artifact: Path, cache_folder: Path) -> None:
        """Raise Reject for what lies beside the folders that it `loads`; those were checked before."""

    @classmethod
    def tensors(cls, file: Path) -> "Iterator[tuple[str, torch.Tensor]]":
        """Tensors of one of its files by name, one at a time; none of a file without weights. Raises Reject
        (damaged-weights)."""
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            from ..models.checkpoints.safetensors_header import read_safetensors_header

            read_safetensors_header(file)
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    yield name, opened.get_tensor(name)

    @classmethod
    def run(cls, request: RunRequest) -> bool:
        """Run an artifact that is more than a model; False where `effc run` opens a model and talks to it."""
        return False

    @classmethod
    def summary(cls, folder: Path) -> "ArtifactSummary | None":
        """Picture of such a folder for `effc inspect`, where that is not a model's structure."""
        return None

    @classmethod
    def results(cls, path: Path, ctx: "Context") -> "Iterator[tuple[str, torch.nn.Module]] | None":
        """Models that running an artifact led to, by name, each good until the next; None where it was not run."""
        return None

    @classmethod
    def words(cls, folder: Path) -> Path:
        """Path of the tokenizer of such a folder."""
        return folder

    def forms(self) -> tuple[Form, ...]:
        """The folders that it may have written and that load as models."""
        return ()

    def forms_of(self, outcome: "Outcome") -> tuple[Form, ...]:
        """Forms of a written artifact, where they depend on the outcome."""
        return self.forms()
