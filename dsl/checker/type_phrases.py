"""How types are said, and what a value of each looks like."""

from .vocabulary import Param

PHRASES = {
    "int": "a whole number",
    "float": "a number",
    "ratio": "a ratio",
    "bytes": "a size in bytes",
    "duration": "a duration",
    "string": "a string",
    "bool": "`true` or `false`",
    "profile": "a profile",
    "selector": "a selector",
    "range": "a range",
    "shares": "a set of shares",
    "data": "data",
    "metric": "a metric",
    "model": "a model",
    "step": "a step",
    "choice": "a word",
    "list": "a list",
}
SAMPLES = {
    "int": "4",
    "float": "0.5",
    "ratio": "85%",
    "bytes": "24GiB",
    "duration": "30ms",
    "string": '"text"',
    "selector": '"layers.*.mlp"',
    "range": "1..8",
    "shares": "{blocks: 3, channels: 1}",
    "metric": "perplexity(calib)",
    "bool": "true",
}
DECLARED = {
    "data": 'data calib = text("calib.txt")',
    "model": 'model base = hf("org/name")',
    "profile": "profile laptop { threads: 2 }",
    "step": "thin = prune.channels(...)",
}


def wanted_phrase(want: Param) -> str:
    """`a whole number of blocks or a ratio`."""
    words = []
    for name in want.types:
        inner = name.removeprefix("list[").removesuffix("]")
        phrase = PHRASES[inner] if inner == name else f"a list of {PHRASES[inner].removeprefix('a ')}s"
        if name == "choice" and want.choices:
            phrase = "one of " + ", ".join(want.choices)
        if name == "shares" and want.of:
            phrase += f" for {listed(want.of)}"
        words.append(phrase + (f" of {want.unit}" if name == "int" and want.unit else ""))
    return " or ".join(dict.fromkeys(words))


def listed(names: tuple[str, ...]) -> str:
    """`blocks, channels and heads`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def like(want: Param) -> str:
    if text := sample(want):
        return f"write it like `{text}`"
    if declared := DECLARED.get(want.types[0].removeprefix("list[").removesuffix("]")):
        return f"declare it, like `{declared}`, and write its name here, without quotes"
    return ""


def sample(want: Param) -> str:
    """A value of the first of the wanted types, "" where any would mislead."""
    first = want.types[0]
    if first.startswith("list["):
        inner = SAMPLES.get(first[5:-1], "")
        return f"[{inner}]" if inner else ""
    if first == "shares" and want.of:
        return "{" + ", ".join(f"{name}: {len(want.of) - i}" for i, name in enumerate(want.of)) + "}"
    return want.choices[0] if first == "choice" else SAMPLES.get(first, "")
