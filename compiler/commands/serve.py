"""`effc serve`: a model behind OpenAI's interface."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...dsl.diagnostics import Reject
from .exits import interrupted
from .flags import Shared, verb
from .run import no_words

_place = typer.Argument(metavar="MODEL", help="An artifact, a model folder, zoo:NAME or hf:ORG/NAME.",
                        show_default=False)
_host = typer.Option("--host", metavar="HOST", help="Address to answer at; 0.0.0.0 is all of the machine's.")
_port = typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")
_name = typer.Option("--name", metavar="TEXT", show_default=False,
                     help="What clients call the model; its folder's name unless given.")
_parallel = typer.Option("--parallel", metavar="N", min=1, max=16, help="Requests that are answered at once.")
_queue = typer.Option("--queue", metavar="N", min=0, max=100_000,
                      help="Requests that may wait; more are told to come back.")


def register(app: typer.Typer) -> None:
    @verb(app, shows=("machine",))
    def serve(model: Annotated[str, _place], shared: Shared, host: Annotated[str, _host] = "127.0.0.1",
              port: Annotated[int, _port] = 8000, name: Annotated[str | None, _name] = None,
              parallel: Annotated[int, _parallel] = 16, queue: Annotated[int, _queue] = 64) -> None:
        """Answer OpenAI's chat and completions API, many requests at once."""
        from ..machine.environment import check_modules

        shared.check_environment()
        check_modules(["fastapi", "uvicorn"], "serve", "`effc serve`")
        from ..serving.server import listening, url_of
        from ..serving.server import serve as answer

        listener = listening(host, port)
        service = _service(model, name or _called(model), shared, parallel, queue)
        url = url_of(listener)
        try:
            answer(service, listener, lambda: _tell(shared, service.name, url))
        except KeyboardInterrupt:
            raise Reject(interrupted("the server has stopped; running answers were cancelled")) from None


def _called(place: str) -> str:
    """A model's name by the place that it was opened at."""
    from ..artifacts.load import FORMS

    kind, colon, name = place.partition(":")
    if colon and kind in ("zoo", "hf"):
        return name
    path = Path(place).resolve()
    return path.parent.name if path.name in FORMS else path.name


def _service(place: str, name: str, shared: Shared, parallel: int, queue: int):
    import torch

    from ..native.sampling import as_tokens
    from ..opened import open_model
    from ..serving.api import Service
    from ..serving.runner import runner_of
    from ..serving.scheduler import Scheduler

    if shared.threads:
        torch.set_num_threads(shared.threads)
    opened = open_model(place, shared.settings(), steady=True)
    if opened.tokenizer is None:
        raise Reject(no_words(f"{opened.label} has no tokenizer",
                              help="copy the tokenizer files beside the weights"))
    runner = runner_of(opened.model, opened.label)
    known = (opened.model.generation_config.eos_token_id, opened.tokenizer.eos_token_id)
    ends = next((as_tokens(found) for found in known if found is not None), ())
    scheduler = Scheduler(runner, opened.tokenizer, ends or (), queue, parallel)
    return Service(name, scheduler, opened.tokenizer, runner.context, runner.vocabulary)


def _tell(shared: Shared, name: str, url: str) -> None:
    if shared.format == "json":
        shared.screen.answer_json("serve", model=name, url=url)
    else:
        shared.screen.answer(f"{name} at {url}/v1")
    sys.stdout.flush()
