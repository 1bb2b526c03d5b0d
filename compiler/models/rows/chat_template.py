"""A tokenizer's chat template, rendered in a process of its own: it came with the model, from anybody."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from ....dsl.syntax.diagnostics import Fault
from ..checkpoints.text_process import LimitExceeded, text_process

invalid_template = Fault(
    "bad-chat-template", "The template by which a tokenizer writes conversations can't be used.", exit="environment"
)
TEMPLATE = 1 << 20  # characters of a template


class TooLong(TemplateError):
    """A template that takes more than any conversation needs."""


def render_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text of a conversation. Raises TemplateError or ValueError where the template refuses it."""
    template = tokenizer.get_chat_template()
    if len(template) > TEMPLATE:
        raise TooLong(f"it has {len(template)} characters")
    if not messages:
        raise ValueError("there are no messages")
    request = {**tokenizer.special_tokens_map, **variables, "chat_template": template, "messages": list(messages)}
    try:
        answer, _ = text_process(sum(len(str(message)) for message in messages)).request("render", request)
    except LimitExceeded as error:
        raise TooLong(str(error)) from error
    if "text" not in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


def render_template_or_reject(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render a conversation by the tokenizer's chat template. Raises Reject (bad-chat-template)."""
    try:
        return render_template(tokenizer, messages, **variables)
    except (TemplateError, ValueError) as error:
        raise invalid_template(
            f"the tokenizer's chat template can't be used: {(str(error).splitlines() or ['?'])[0]}",
            help="fetch the tokenizer files again",
        ).rejection() from error
