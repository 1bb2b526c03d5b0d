"""A table of a page as JSON, as a script's `--json FILE` writes it; `python -m bench.tables` puts it into the page.

    {"date": "2026-11-28", "machine": {...}, "columns": ["zeros", "docs"], "rows": [["50%", "24.95"]]}

Cells are texts, as the page shows them. One whose `source` says so was copied from a page once; a rerun replaces it.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="where to write the table, docs/measurements/data/NAME.json")


def write_table(path: Path | None, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table, if there is somewhere to."""
    from effc.compiler.core.fingerprint import machine_facts

    if path is None:
        return
    body = {"date": time.strftime("%Y-%m-%d"), "machine": machine_facts(), "columns": columns, "rows": list(rows)}
    path.write_text(json.dumps(body, indent=1) + "\n", "utf-8")
