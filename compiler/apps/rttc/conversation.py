"""`effc run` of a folder of the target `rttc`: one answer, or line by line, with what was decided."""

from typing import TYPE_CHECKING

from ....dsl.syntax.diagnostics import Reject
from ...plugin.target import RunRequest

if TYPE_CHECKING:
    from .generation import Settings
    from .guided import Answered, GuidedModel
    from .policy import Decision


def answer_prompt_or_lines(request: RunRequest) -> None:
    """Answer a prompt, or the lines that a person writes until Ctrl-D; each stands for itself."""
    from ...driver.models import model_errors_as_diagnostics
    from .generation import Settings
    from .guided_opening import open_guided_model

    prompt, sampling = request.text(), Settings(request.max_new_tokens, request.temperature, seed=request.settings.seed)
    with model_errors_as_diagnostics(str(request.artifact)):
        client = open_guided_model(str(request.artifact), request.settings, request.knowledge, request.speculation)
        try:
            _answer_prompt_or_stdin(client, prompt, request, sampling)
        finally:
            client.lists.flush()
            client.states.flush()


def _answer_prompt_or_stdin(
    client: "GuidedModel", prompt: str | None, request: RunRequest, sampling: "Settings"
) -> None:
    def answer(question: str) -> "Answered":
        return client.answer_conversation([{"role": "user", "content": question}], sampling)

    if prompt is not None:
        return _print_answer(answer(prompt), prompt, request)
    while (line := _read_line_or_none_at_end()) is not None:
        try:
            if line.strip():
                _print_answer(answer(line), line, request)
        except Reject as rejection:
            request.screen.complain(rejection.diagnostics, "run")
    return None


def _read_line_or_none_at_end() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


def _print_answer(answered: "Answered", prompt: str, request: RunRequest) -> None:
    screen = request.screen
    if screen.format == "json":
        screen.answer_json(
            "run",
            prompt=prompt,
            text=answered.text,
            stop=answered.finish,
            prompt_tokens=answered.prompt_tokens,
            new_tokens=answered.new_tokens,
            decision=answered.decision.to_json(),
        )
        return
    screen.answer(answered.text)
    if request.explain or answered.decision.note:
        screen.note(decision_sentence(answered.decision))


def decision_sentence(decision: "Decision") -> str:
    """Sentence about the branch that answered and its cost."""
    from ...core.quantity import count_text, duration_text

    names = {"direct": "directly", "rag": "with samples in the prompt", "ttt": "after a training on samples"}
    parts = [f"answered {names[decision.branch]}"]
    if decision.adapter_hit:
        parts.append("by the adapters of an earlier query")
    elif decision.samples:
        where = "from the cache" if decision.list_hit else "retrieved"
        parts.append(f"{count_text(decision.samples, 'sample')} {where}")
    if decision.steps:
        parts.append(count_text(decision.steps, "step"))
    if decision.rewards:
        parts.append("rewards " + ", ".join(_reward_text(decision, name) for name in decision.rewards))
    parts.append(", ".join(f"{name} {duration_text(value)}" for name, value in decision.seconds.items()))
    return "; ".join(part for part in parts if part) + (f"\nnote: {decision.note}" if decision.note else "")


def _reward_text(decision: "Decision", branch: str) -> str:
    chance = decision.chances.get(branch)
    return f"{branch} {decision.rewards[branch]:.3g}" + ("" if chance is None else f" (right by {chance:.0%})")
