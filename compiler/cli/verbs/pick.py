"""`effc pick`: one model out of a front, as an artifact of its own."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import SharedFlags, make_verb
from .options import argument, option

_front = argument("ARTIFACT", "What the target `front` wrote.")
_out = option("Where the picked model goes.", "-o", "--output", metavar="FOLDER")
_point = option("The point: its name, or its number from 1.", "--point", metavar="NAME|N")
_params = option("At most so many parameters: 1.6M.", "--params", metavar="N")
_bytes = option("At most so many bytes of weights: 6MiB.", "--bytes", metavar="SIZE")
_latency = option("At most so long for a token: 30ms.", "--latency", metavar="TIME")
_on = option(
    "Only if the measures are of the machine that this profile of the recipe describes.", "--on", metavar="PROFILE"
)
_limit = option("A limit on any measure of the front.", "--limit", metavar="METRIC=VALUE")
_force = option("Replace an artifact that exists.", "--force")


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("machine", "progress"), signed_arguments=("artifact",))
    def pick(
        artifact: Annotated[Path, _front],
        shared: SharedFlags,
        output: Annotated[Path | None, _out] = None,
        point: Annotated[str, _point] = "",
        params: Annotated[str, _params] = "",
        bytes: Annotated[str, _bytes] = "",
        latency: Annotated[str, _latency] = "",
        on: Annotated[str, _on] = "",
        limit: Annotated[list[str] | None, _limit] = None,
        force: Annotated[bool, _force] = False,
    ) -> int:
        """Take one model out of a front: the best that keeps the limits, or the point that you name."""
        from ...driver.point_limits import parse_limits as limits_of

        limits_by_metric = {"params": params, "bytes": bytes, "decode.p50": latency}
        texts = [*(f"{name}={value}" for name, value in limits_by_metric.items() if value), *(limit or ())]
        if any("=" not in text for text in texts):
            raise typer.BadParameter("a limit reads METRIC=VALUE: --limit 'perplexity(heldout)=34'")
        from ...artifacts.front_kinds import read_front_manifest

        front = read_front_manifest(artifact)  # what holds no points is refused first, before anybody imports torch
        if texts and point:
            raise typer.BadParameter(f"`--point {point}` says which point: leave it out, or the limit {texts[0]}")
        if not texts and not point:
            raise typer.BadParameter("say which point: --point NAME, or limits such as --params 1.6M")
        limits = limits_of(texts)
        from ...driver import pick as picking
        from ...driver.point_times import undecided_reason_by_point

        where = output or artifact.with_name(f"{artifact.name}-picked")
        with shared.listening() as listener:
            name, manifest = picking.copy_point(
                artifact, where, point_name=point, limits=limits, profile_name=on, force=force, on_event=listener
            )
        notes = list(undecided_reason_by_point(front, picking.measures_by_point(front), limits).values())
        if shared.format == "json":
            shared.screen.answer_json("pick", point=name, path=str(where), bytes=manifest.bytes, notes=notes)
        else:
            shared.screen.answer(f"{name} -> {where}")
            for note in notes:
                shared.screen.note(note)
            shared.screen.note(f"ok: {len(manifest.checks)} checks in a fresh process")
        return 0
