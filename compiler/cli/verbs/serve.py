"""`effc serve`: a model behind OpenAI's interface."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...apps.rttc.guided_opening import no_such_role
from ...core.environment import check_modules
from .exit_codes import interrupted
from .flags import (
    SharedFlags,
    finite_or_bad_parameter,
    knowledge_url,
    make_verb,
    mapped_weights,
    parse_size,
    speculation_option,
)
from .model_services import ModelOptions
from .model_sources import ModelSource, no_reload, parse_model_arguments, refuse_reload_beside_personal_files
from .services import Service, guided_service, knowledge_search_service, model_service

if TYPE_CHECKING:
    from ...apps.serving.access_log import AccessLog
    from ...apps.serving.connection import LimitedSocket
    from ...apps.serving.keys import Keys
    from ...apps.serving.server import NetworkSettings

_models = typer.Argument(
    metavar="MODEL", help="Artifacts, model folders, zoo:NAME or hf:ORG/NAME; NAME=MODEL names one.", show_default=False
)
_host = typer.Option("--host", metavar="HOST", help="Address to answer at; 0.0.0.0 is all of the machine's.")
_port = typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")
_name = typer.Option(
    "--name", metavar="TEXT", show_default=False, help="What clients call a model; its folder's name unless given."
)
_role = typer.Option(
    "--role",
    metavar="client|server",
    show_default=False,
    help="Of a folder of `rttc`: answer, or give samples to clients that do.",
)
_engine = typer.Option(
    "--engine",
    metavar="NAME|URL",
    help="What finds samples, with --role server: flat, faiss, postgresql://..., qdrant:http://...; auto is flat up to "
    "100,000 samples.",
)
_adapter = typer.Option(
    "--adapter",
    metavar="NAME=FOLDER",
    show_default=False,
    help="Interventions (target `reft`) or LoRA that requests may name: the model MODEL:NAME; repeatable. `*=FOLDER`: "
    "all in FOLDER. With several models MODEL:NAME=FOLDER.",
)
_parallel = typer.Option("--parallel", metavar="N", min=1, max=16, help="Requests that a model answers at once.")
_queue = typer.Option(
    "--queue", metavar="N", min=0, max=100_000, help="Requests that may wait for a model; more are told to come back."
)
_key = typer.Option(
    "--api-key",
    metavar="KEY",
    show_default=False,
    help="Answer only who sends it; repeatable. EFFC_API_KEY holds several, with commas between.",
)
_insecure = typer.Option("--insecure", help="Serve other machines without a key.")
_cert = typer.Option("--tls-cert", metavar="FILE", show_default=False, help="Certificate (PEM): serve HTTPS.")
_tls_key = typer.Option("--tls-key", metavar="FILE", show_default=False, help="Its private key (PEM).")
_hosts = typer.Option(
    "--allow-host",
    metavar="NAME",
    show_default=False,
    help="A name that clients may ask under, such as a proxy's; repeatable.",
)
_cors = typer.Option(
    "--cors",
    metavar="ORIGIN",
    show_default=False,
    help="Web pages that may use the server, such as https://example.org; repeatable.",
)
_body = typer.Option(
    "--max-body",
    metavar="SIZE",
    parser=parse_size,
    show_default=False,
    help="Largest body of a request; 4MiB unless given.",
)
_rate = typer.Option(
    "--rate",
    metavar="N",
    min=0.1,
    max=1e6,
    callback=finite_or_bad_parameter,
    show_default=False,
    help="Requests a minute of one client, by its key or address; a quarter of them may come at once.",
)
_connections = typer.Option("--connections", metavar="N", min=1, max=100_000, help="Connections open at once.")
_timeout = typer.Option(
    "--timeout",
    metavar="SECONDS",
    min=0.1,
    max=3600.0,
    callback=finite_or_bad_parameter,
    help="For the headers of a request, and between two of one connection.",
)
_elastic = typer.Option(
    "--elastic",
    metavar="LARGE:SMALL",
    show_default=False,
    help="New requests to LARGE go to SMALL, another model that is served, while LARGE is busy; repeatable.",
)
_otlp = typer.Option(
    "--otlp",
    metavar="URL",
    show_default=False,
    help="Send a span of each request, without its texts, to this OpenTelemetry collector (OTLP over HTTP).",
)
_reload = typer.Option(
    "--reload", help="Let SIGHUP open the models' folders again; running answers end on the models that they began on."
)
_log = typer.Option("--access-log", metavar="FILE", help="JSON lines without prompts: `-` is stderr, or `none`.")


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("machine",), signed_arguments=("model", "adapter"))
    def serve(
        model: Annotated[list[str], _models],
        shared: SharedFlags,
        host: Annotated[str, _host] = "127.0.0.1",
        port: Annotated[int, _port] = 8000,
        name: Annotated[str | None, _name] = None,
        role: Annotated[str | None, _role] = None,
        knowledge: Annotated[str | None, knowledge_url] = None,
        engine: Annotated[str, _engine] = "auto",
        adapter: Annotated[list[str], _adapter] = (),  # type: ignore[assignment]
        elastic: Annotated[list[str], _elastic] = (),  # type: ignore[assignment]
        parallel: Annotated[int, _parallel] = 16,
        queue: Annotated[int, _queue] = 64,
        api_key: Annotated[list[str], _key] = (),  # type: ignore[assignment]
        insecure: Annotated[bool, _insecure] = False,
        tls_cert: Annotated[Path | None, _cert] = None,
        tls_key: Annotated[Path | None, _tls_key] = None,
        allow_host: Annotated[list[str], _hosts] = (),  # type: ignore[assignment]
        cors: Annotated[list[str], _cors] = (),  # type: ignore[assignment]
        max_body: Annotated[int | None, _body] = None,
        rate: Annotated[float | None, _rate] = None,
        connections: Annotated[int, _connections] = 256,
        timeout: Annotated[float, _timeout] = 15.0,
        access_log: Annotated[str, _log] = "-",
        otlp: Annotated[str | None, _otlp] = None,
        reload: Annotated[bool, _reload] = False,
        mapped: Annotated[bool | None, mapped_weights] = None,
        speculation: Annotated[bool, speculation_option] = False,
    ) -> None:
        """Answer OpenAI's chat and completions API by one or several models, many requests at once."""
        shared.require_environment()
        sources = _parse_sources(model, name, adapter, reload)
        check_modules(["fastapi", "uvicorn", "prometheus_client"], "serve", "`effc serve`")
        from ...apps.serving import server
        from ...apps.serving.elastic import parse_elastic_options
        from ...apps.serving.limits import MIB, Limits
        from ...apps.serving.rate import RateLimit

        smaller = parse_elastic_options(elastic, [source.name for source in sources])
        server.refuse_unusable_certificate(tls_cert, tls_key)
        listener = server.open_listener(host, port)
        admission = server.make_admission_or_refuse(listener, host, _read_api_keys(api_key), allow_host, insecure)
        bounded = replace(admission, rate=RateLimit(rate) if rate else None)
        _warn_if_open_to_everybody(shared, host, insecure and not admission.keys)
        limits = Limits(max_body or 4 * MIB, connections, timeout)
        network = server.NetworkSettings(bounded, limits, _open_log(access_log, shared), tls_cert, tls_key, tuple(cors))
        options = ModelOptions(parallel, queue, mapped, speculation, smaller, _checked_collector_url(otlp))
        service = _make_service(sources, role, knowledge, engine, shared, options)
        _serve_until_signal(service, listener, network, reload, shared)


def _parse_sources(models: Sequence[str], name: str | None, adapters: Sequence[str], reload: bool) -> list[ModelSource]:
    sources = parse_model_arguments(models, name, adapters)
    if reload:
        refuse_reload_beside_personal_files(sources)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    return sources


def _checked_collector_url(url: str | None) -> str | None:
    """URL of a collector; BadParameter or Reject where no span could be sent there."""
    if url is None:
        return None
    needed = ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"]
    check_modules(needed, "otel", "`effc serve --otlp`")
    from ...apps.serving.tracing import traces_endpoint

    try:
        traces_endpoint(url)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return url


def _serve_until_signal(
    service: Service, listener: "LimitedSocket", network: "NetworkSettings", reload_on_sighup: bool, shared: SharedFlags
) -> None:
    from ...apps.serving import server

    app = server.with_guard(service.app, service.count, network)
    on_hangup = _reload_function(service, network.log) if reload_on_sighup else None
    try:
        on_ready = partial(_print_address, shared, service.names, server.url_of(listener, network.cert is not None))
        server.run_until_signal(app, listener, network, on_ready, service.stop, on_hangup)
    except KeyboardInterrupt:
        raise interrupted("the server has stopped; running answers were cancelled").rejection() from None


def _reload_function(service: Service, log: "AccessLog") -> Callable[[], None]:
    if service.reloader is None:
        raise no_reload(
            f"`{service.names[0]}` keeps what it learns from requests", help="serve it without --reload"
        ).rejection()
    return service.reloader(log).request


def _read_api_keys(key_files: Sequence[str]) -> "Keys":
    """Keys of --api-key and of the environment."""
    from ...apps.serving.keys import Keys

    from_environment = [key.strip() for key in os.environ.get("EFFC_API_KEY", "").split(",") if key.strip()]
    return Keys([*key_files, *from_environment])


def _open_log(destination: str, shared: SharedFlags) -> "AccessLog":
    from ...apps.serving.access_log import open_access_log

    return open_access_log("none" if shared.quiet and destination == "-" else destination)


def _warn_if_open_to_everybody(shared: SharedFlags, host: str, is_open_to_everybody: bool) -> None:
    if is_open_to_everybody:
        shared.screen.note(f"warning: everybody who reaches {host} may use the model")


def _make_service(
    sources: Sequence[ModelSource],
    role: str | None,
    knowledge: str | None,
    engine: str,
    shared: SharedFlags,
    options: ModelOptions,
) -> Service:
    from ...apps.rttc.app_folder import is_rttc_app_folder

    source, apps = sources[0], [s.location for s in sources if is_rttc_app_folder(s.location)]
    if not apps:
        if role or knowledge or engine != "auto":
            raise no_such_role(
                f"`{source.location}` is no folder of the target `rttc`",
                help="serve it without --role, --knowledge and --engine",
            ).rejection()
        return model_service(sources, shared, options)
    if len(sources) > 1:
        raise no_such_role(
            f"`{apps[0]}` chooses what answers by itself", help="serve it without other models"
        ).rejection()
    if options.collector is not None:
        raise no_such_role(f"requests to `{source.location}` have no spans", help="serve it without --otlp").rejection()
    if source.adapters:
        raise no_such_role(
            f"`{source.location}` chooses what answers by itself", help="serve it without --adapter"
        ).rejection()
    if role == "server" and knowledge:
        raise no_such_role("a server has the base itself", help="give --knowledge to its clients").rejection()
    if role == "server":
        return knowledge_search_service(source.location, source.name, shared, engine)
    if role not in (None, "client"):
        raise no_such_role(f"`{role}` is no role", help="write `--role client` or `--role server`").rejection()
    if engine != "auto":
        raise no_such_role("a client has no --engine", help="give it to the server of --role server").rejection()
    return guided_service(source.location, source.name, shared, options.queue, knowledge, options.speculation)


def _print_address(shared: SharedFlags, names: Sequence[str], url: str) -> None:
    if shared.format == "json":
        shared.screen.answer_json("serve", model=names[0], models=list(names), url=url)
    else:
        shared.screen.answer(f"{', '.join(names)} at {url}/v1")
    sys.stdout.flush()
