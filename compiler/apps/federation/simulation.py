"""A whole federation in this process: clients share one model and take turns with it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint
from .client_host import ClientHost
from .declaration import Declaration, make_federation
from .grid import LocalGrid
from .history import Round
from .rounds import Federation

if TYPE_CHECKING:
    from ...core.settings import Settings


def simulate_federation(
    declaration: Declaration,
    model_folder: Path,
    data_folder: Path,
    settings: "Settings",
    on_round: Callable[[Round], None] = lambda round_: None,
) -> Federation:
    """Run all rounds; killed and called again, it goes on. Reject where it can't be finished."""
    host = ClientHost(declaration, model_folder, data_folder, settings)
    host.check_base_model()
    checkpoint = Checkpoint(settings.cache_dir / "federations" / declaration.identity, declaration.identity)
    with host.participants(list(range(declaration.clients))) as clients:
        run = make_federation(declaration, LocalGrid(clients), checkpoint, on_round)
        run.run()
    checkpoint.clear()
    return run
