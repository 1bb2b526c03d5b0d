"""Measured rows of a script in a file, each with the setting it was measured in, so that a run goes on where it ended."""

import json
from pathlib import Path
from typing import Any


class RowStore:
    """Rows of one setting; the file keeps those of other settings as well."""

    def __init__(self, path: Path, setting: dict[str, Any]):
        self.path, self.setting = path, setting
        stored = json.loads(path.read_text("utf-8")) if path.is_file() else []
        self.rows = [row for row in stored if all(row.get(name) == value for name, value in setting.items())]
        self.rows_of_other_settings = [row for row in stored if row not in self.rows]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row | self.setting)
        lines = map(json.dumps, self.rows_of_other_settings + self.rows)
        self.path.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")
