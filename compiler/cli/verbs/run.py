"""`effc run`: talk to a model, on a terminal or through a pipe."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ....dsl.syntax.diagnostics import Reject
from ...driver.models import check_model_path
from .flags import SharedFlags, finite_or_bad_parameter, knowledge_url, make_verb, mapped_weights, speculation_option
from .options import argument, option
from .pipe_streams import raise_if_reader_left
from .speech import SafeText

_model = argument("MODEL", "An artifact, a model folder, zoo:NAME or hf:ORG/NAME.")
_prompt = option("Answer this and leave.", "-p", "--prompt", metavar="TEXT")
_length = option("Longest answer in tokens.", "--max-new-tokens", "-n", metavar="N", min=1, show_default=True)
_warmth = option(
    "0 takes the likeliest token each time.",
    "--temperature",
    "-t",
    metavar="T",
    min=0.0,
    callback=finite_or_bad_parameter,
    show_default=True,
)
_pick = option("Of a front: one point, or the best within limits.", "--pick", metavar="NAME|N|METRIC=VALUE")
_adapter = option(
    "Interventions (target `reft`) or a LoRA to answer with; lines that begin with :NAME choose among several.",
    "--adapter",
    metavar="NAME=FOLDER",
)
_explain = option("Of a folder of `rttc`: say which branch answered, and why.", "--explain", show_default=True)


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("machine",), signed_arguments=("model", "adapter"))
    def run(
        model: Annotated[str, _model],
        shared: SharedFlags,
        prompt: Annotated[str | None, _prompt] = None,
        max_new_tokens: Annotated[int, _length] = 256,
        temperature: Annotated[float, _warmth] = 0.0,
        knowledge: Annotated[str | None, knowledge_url] = None,
        explain: Annotated[bool, _explain] = False,
        pick: Annotated[str, _pick] = "",
        mapped: Annotated[bool | None, mapped_weights] = None,
        adapter: Annotated[list[str], _adapter] = (),  # type: ignore[assignment]
        speculation: Annotated[bool, speculation_option] = False,
    ) -> None:
        """Talk to a model: a chat, or one answer with --prompt or a pipe. Of a federation: simulate it."""
        shared.require_environment()
        check_model_path(model)
        if prompt is not None and any("\ud800" <= sign <= "\udfff" for sign in prompt):
            raise typer.BadParameter("the text of `--prompt` is not UTF-8")
        if pick:
            from ...driver.pick import point_folder_or_copy

            note = shared.screen.note
            model = str(point_folder_or_copy(Path(model), pick, needs_tokenizer=True, on_note=note))
        from ...artifacts.load import target_of_artifact
        from ...plugin.target import RunRequest

        request = RunRequest(
            Path(model),
            shared.screen,
            shared.settings(),
            prompt,
            max_new_tokens,
            temperature,
            knowledge,
            explain,
            speculation,
        )
        target = target_of_artifact(Path(model))
        if target is None or not target.run(request):
            _run_chat(model, request.text(), shared, max_new_tokens, temperature, adapter, mapped, speculation)


def _run_chat(
    location: str,
    prompt: str | None,
    shared: SharedFlags,
    max_new_tokens: int,
    temperature: float,
    adapters: Sequence[str],
    mapped: bool | None,
    speculation: bool,
) -> None:
    from ...apps.serving.adapters import AdapterChats, model_copies_with_adapters, parse_adapter_options
    from ...apps.serving.chat import ChatSession, refuse_without_generate
    from ...driver.models import model_errors_as_diagnostics, open_model
    from ...runtimes.model import DecoderModel

    folders = parse_adapter_options(adapters)
    opened = open_model(location, shared.settings(), batch_invariant=speculation, mapped=mapped, needs_tokenizer=True)
    refuse_without_generate(opened.model)
    draft_tokens = opened.model.draft_tokens if isinstance(opened.model, DecoderModel) else 0
    models = {"": opened.model, **model_copies_with_adapters(opened.model, opened.label, folders)}
    by_name = {
        name: ChatSession(model, opened.tokenizer, max_new_tokens, temperature, shared.seed, draft_tokens, location)
        for name, model in models.items()
    }
    chat_session = AdapterChats(by_name) if adapters else by_name[""]
    with model_errors_as_diagnostics(opened.label):
        if prompt is None:
            run_chat_loop(chat_session, opened.label, shared)
        else:
            answer_once(chat_session, prompt, shared)


def answer_once(chat_session, prompt: str, shared: SharedFlags) -> None:
    """Answer one prompt: the text to stdout as it comes, or one JSON object."""
    if shared.format == "json":
        reply = chat_session.answer(prompt, lambda text: None)
        _raise_if_reply_was_stopped(reply)
        return shared.screen.answer_json(
            "run",
            prompt=prompt,
            text=reply.text,
            stop=reply.stop,
            prompt_tokens=reply.prompt_tokens,
            new_tokens=reply.new_tokens,
            seconds=round(reply.seconds, 4),
            tokens_per_second=round(reply.tokens_per_second, 2),
        )
    speech = SafeText()
    reply = chat_session.answer(prompt, lambda text: _write_to_stdout(speech.safe_part(text)))
    _write_to_stdout(f"{speech.remaining_text()}\n")
    _raise_if_reply_was_stopped(reply)
    if shared.verbose:
        shared.screen.note(_speed_text(reply))


def _raise_if_reply_was_stopped(reply) -> None:
    if reply.stop == "stopped":
        raise KeyboardInterrupt


def run_chat_loop(chat_session, label: str, shared: SharedFlags) -> None:
    """A chat: Ctrl-C stops the answer, Ctrl-D ends."""
    from ...plugin.target import read_utf8_prompt
    from .interrupt import only_raise_on_interrupt

    screen = shared.screen
    kind = "answers" if chat_session.has_chat_template else "continues your text"
    screen.note(screen.styled(f"{label} {kind}; Ctrl-C stops it, Ctrl-D ends", "dim", stream=sys.stderr))
    mark = _enable_readline_for_prompt(screen.styled("> ", "cyan"))
    with only_raise_on_interrupt():
        while True:
            try:
                line = read_utf8_prompt(lambda: input(mark), "the line")
            except KeyboardInterrupt:
                print()
                continue
            except Reject as rejection:
                screen.complain(rejection.diagnostics, "run")
                continue
            except EOFError:
                print()
                return
            if line.strip():
                _answer_line(chat_session, line, shared)


def _enable_readline_for_prompt(styled: str) -> str:
    """A prompt with line editing and history, where Python has readline: it must know what takes no room."""
    try:
        import readline  # noqa: F401 (`input` uses it once it is imported)
    except ImportError:
        return styled
    return re.sub(r"(\x1b\[[0-9;]*m)", "\x01\\1\x02", styled)


def _answer_line(chat_session, line: str, shared: SharedFlags) -> None:
    speech = SafeText()
    try:
        reply = chat_session.answer(line, lambda text: _write_to_stdout(speech.safe_part(text)))
    except Reject as rejection:
        return shared.screen.complain(rejection.diagnostics, "run")
    mark = " …" if reply.stop == "stopped" else ""
    _write_to_stdout(f"{speech.remaining_text()}{mark}\n")
    if shared.verbose:
        shared.screen.note(shared.screen.styled(_speed_text(reply), "dim", stream=sys.stderr))
    return None


def _speed_text(reply) -> str:
    from ...core.quantity import duration_text, significant_digits

    speed = significant_digits(reply.tokens_per_second, 3)
    return f"{reply.new_tokens} tokens in {duration_text(reply.seconds)}, {speed} per second, {reply.stop}"


def _write_to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
    raise_if_reader_left()
