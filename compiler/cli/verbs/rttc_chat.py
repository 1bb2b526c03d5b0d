"""`effc run` of a folder of the target `rttc`: one answer, or line by line, with what was decided."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Reject
from .flags import Shared

if TYPE_CHECKING:
    from ...apps.rttc.generation import Settings
    from ...apps.rttc.guided import Answered, GuidedModel
    from ...apps.rttc.policy import Decision


def answer_lines(
    folder: str, prompt: str | None, shared: Shared, knowledge: str | None, explain: bool, sampling: Mapping[str, Any]
) -> None:
    """Answer a prompt, or the lines that a person writes until Ctrl-D; each stands for itself."""
    from ...apps.rttc.generation import Settings
    from ...driver.models import model_errors_as_diagnostics
    from .services import open_guided_model

    with model_errors_as_diagnostics(folder):
        client, settings = open_guided_model(folder, shared, knowledge), Settings(**sampling)
        return _answer_queries(client, prompt, shared, explain, settings)


def _answer_queries(
    client: "GuidedModel", prompt: str | None, shared: Shared, explain: bool, settings: "Settings"
) -> None:
    try:
        if prompt is not None:
            return _print_answer(
                client.answer_conversation([{"role": "user", "content": prompt}], settings), prompt, shared, explain
            )
        while (line := _line()) is not None:
            try:
                if line.strip():
                    _print_answer(
                        client.answer_conversation([{"role": "user", "content": line}], settings), line, shared, explain
                    )
            except Reject as rejection:
                shared.screen.complain(rejection.diagnostics, "run")
    finally:
        client.lists.flush()
        client.states.flush()
    return None


def _line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


def _print_answer(answered: "Answered", prompt: str, shared: Shared, explain: bool) -> None:
    screen = shared.screen
    if shared.format == "json":
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
    if explain or answered.decision.note:
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
        parts.append("rewards " + ", ".join(_reward(decision, name) for name in decision.rewards))
    parts.append(", ".join(f"{name} {duration_text(value)}" for name, value in decision.seconds.items()))
    return "; ".join(part for part in parts if part) + (f"\nnote: {decision.note}" if decision.note else "")


def _reward(decision: "Decision", branch: str) -> str:
    chance = decision.chances.get(branch)
    return f"{branch} {decision.rewards[branch]:.3g}" + ("" if chance is None else f" (right by {chance:.0%})")
