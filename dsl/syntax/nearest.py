"""The name that was probably meant."""

from collections.abc import Iterable


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The known name closest to `name`, or "" where none is close."""
    from difflib import get_close_matches

    known = list(dict.fromkeys(names))
    low = {n.lower(): n for n in known}
    if matches := get_close_matches(name.lower(), low, n=1, cutoff=0.9):
        return low[matches[0]]
    if same := [n for n in known if len(n) > 1 and sorted(n.lower()) == sorted(name.lower())]:
        return same[0]  # `4:2` is `2:4`, not `4:8`
    if matches := get_close_matches(name.lower(), low, n=1, cutoff=0.6):
        return low[matches[0]]
    same_suffix = [n for n in known if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return same_suffix[0] if len(same_suffix) == 1 else ""


def nearest_name_help(name: str, names: Iterable[str], listing: str = "") -> str:
    """A help line: the nearest name, else what there is (at most eight of them)."""
    known = list(dict.fromkeys(names))
    if closest := nearest_name(name, known):
        return f"did you mean `{closest}`?"
    if not known or not listing:
        return ""
    remainder = f" and {len(known) - 8} more" if len(known) > 8 else ""
    return f"{listing}: {', '.join(f'`{n}`' for n in known[:8])}{remainder}"
