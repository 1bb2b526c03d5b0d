"""A federation as a table: who holds what, and how many bytes go where in a round."""

from dataclasses import dataclass
from typing import Any

from ...core.quantity import count_text, size_text
from .app import distribution_phrase, training_sentence
from .declaration import Declaration, make_strategy
from .history import Round
from .noise import privacy_sentence
from .state import value_count
from .table import HEAD, round_line


@dataclass(frozen=True)
class FederationSummary:
    """Picture of a Flower App for `effc inspect`, with its history where its result lies beside it."""

    declared: Declaration
    rounds: tuple[Round, ...] = ()

    def table_rows_of_clients(self) -> list[dict[str, Any]]:
        """Rows of a table of clients: what each trains, and the bytes of its arrays in a round; the first round may
        send more."""
        declared, strategy = self.declared, make_strategy(self.declared)
        result = []
        for client in range(declared.clients):
            up = 4 * value_count(strategy.required_shapes(client))  # 0 of a search: it depends on how much is asked
            rank = declared.ranks[client] if declared.ranks else None
            budget = declared.sizes[declared.size_of[client]].params if declared.sizes else None
            row: dict[str, Any] = {
                "client": client,
                "up": up,
                "down": _download_bytes(declared, up),
                "rank": rank,
                "params": budget,
            }
            row["budget"] = declared.budgets[client] if declared.budgets else None
            result.append(row)
        return result

    def to_text(self) -> str:
        declared = self.declared
        data = ", ".join(f"{d.name} ({d.word})" for d in declared.data)
        some = "all" if declared.share >= 1 else f"{declared.share:.0%}"
        head = [
            f"{training_sentence(declared)}, {declared.rounds} rounds of {declared.steps} steps of {declared.batch} "
            "rows",
            f"rows of {data}, {distribution_phrase(declared)}, {declared.hold:.0%} of a client's held back to judge "
            "itself by",
            f"{some} of the clients in a round of {declared.deadline:g} s at most; model {declared.folder}/, sha256 "
            f"{declared.base[:12]}",
        ]
        if declared.secure:
            head.append("the server is given sums of masked states, and no state")
        if declared.clip:
            head.append(f"{declared.protects} are hidden: clip {declared.clip:g}, noise {declared.noise:g}")
        lines = [f"{'client':>6}  {'up':>10}  {'down':>10}  holds"]
        for row in self.table_rows_of_clients():
            part_text = f"rank {row['rank']}" if row["rank"] else "all"
            if row["params"]:
                part_text = f"{row['params']:,} parameters"
            if row["budget"]:
                part_text += (
                    f", {'at most' if declared.allocation == 'sandwich' else 'budget'} {_budget_text(declared, row)}"
                )
            down = size_text(row["down"]) if row["down"] is not None else "grows"
            lines.append(f"{row['client']:>6}  {size_text(row['up']):>10}  {down:>10}  {part_text}")
        if self.rounds:
            lines += [
                "",
                f"ran {count_text(len(self.rounds), 'round')}, the last of them:",
                HEAD,
                round_line(self.rounds[-1]),
            ]
            lines += [privacy_sentence(self.rounds, declared)] if declared.clip else []
        return "\n".join([*head, "", *lines])

    def to_json(self) -> dict[str, Any]:
        return {
            "declaration": self.declared.to_json(),
            "clients": self.table_rows_of_clients(),
            "rounds": [r.to_json() for r in self.rounds],
        }


def _budget_text(declaration: Declaration, row: dict[str, Any]) -> str:
    """As the recipe has it, with what shares and plain numbers are of."""
    text = str(row["budget"])
    return text if text[-1] in "Bshdn" else f"{text} {'of FLOPs' if declaration.counts == 'flops' else 'of parameters'}"


def _download_bytes(declaration: Declaration, upload_bytes: int) -> int | None:
    """Bytes to a client in a later round; None where they grow with its absence and the others' ranks."""
    if declaration.strategy == "alone":
        return 0
    if declaration.strategy == "stack":
        ranks = declaration.ranks or (1,) * declaration.clients
        per_rank = upload_bytes // ranks[0]
        return per_rank * sum(ranks) if declaration.share >= 1 else None
    return upload_bytes
