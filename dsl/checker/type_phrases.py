"""Names of types, and an example value of each."""

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
    "duration": "30min",
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


def expected_phrase(param: Param) -> str:
    """`a whole number of blocks or a ratio`."""
    words = []
    for name in param.types:
        inner = name.removeprefix("list[").removesuffix("]")
        phrase = PHRASES[inner] if inner == name else f"a list of {PHRASES[inner].removeprefix('a ')}s"
        if name == "choice" and param.choices:
            phrase = "one of " + ", ".join(param.choices)
        if name == "shares" and param.of:
            phrase += f" for {joined_with_and(param.of)}"
        words.append(phrase + (f" of {param.unit}" if name == "int" and param.unit else ""))
    return " or ".join(dict.fromkeys(words))


def joined_with_and(names: tuple[str, ...]) -> str:
    """`blocks, channels and heads`."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def example_remedy(param: Param) -> str:
    if text := sample_value_text(param):
        return f"write it like `{text}`"
    if declared := DECLARED.get(param.types[0].removeprefix("list[").removesuffix("]")):
        return f"declare it, like `{declared}`, and write its name here, without quotes"
    return ""


def sample_value_text(param: Param) -> str:
    """A value of the first of the wanted types, "" where any would mislead."""
    first = param.types[0]
    if first.startswith("list["):
        inner = SAMPLES.get(first[5:-1], "")
        return f"[{inner}]" if inner else ""
    if first == "shares" and param.of:
        return "{" + ", ".join(f"{name}: {len(param.of) - i}" for i, name in enumerate(param.of)) + "}"
    return param.choices[0] if first == "choice" else SAMPLES.get(first, "")
