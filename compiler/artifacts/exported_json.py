"""The JSON of an exported program, read for what is on a closed list.

torch's own reader takes text from it to Python: shape expressions go to `sympify`, guards and argument names are
compiled, operators are looked up by any path below torch. Here every text is held against what effc's own programs
have; notes for people and guards are left out, and anything else is refused.
"""

import ast
import keyword
import re
from collections.abc import Callable
from typing import Any

from ..core.safe_read import Unlisted, parse_strict_json, require_or_unlisted
from .exported_ops import is_allowed_operator

_NAME = re.compile(r"[A-Za-z_]\w{0,400}", re.ASCII)
_PATH = re.compile(r"([A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,40})?", re.ASCII)
_TEXT = re.compile(r"[\w ,.>()\-]{0,64}", re.ASCII)
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,9}")
_DEEPEST, _LONGEST = 32, 4000
_MAX_TERMS, _MAX_LEVELS, _MAX_DEGREE = 200, 32, 8  # of an expression over sizes: real ones have 20, 6 and 3
_NUMBERS = ("Infinity", "-Infinity", "NaN")
_DEVICES = ("cpu", "meta")
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_SUMS = frozenset(
    """
    Symbol Integer Rational Add Mul Max Min Mod FloorDiv PythonMod CleanDiv ModularIndexing IntTrueDiv
    Eq Ne Lt Le Gt Ge StrictLessThan LessThan StrictGreaterThan GreaterThan Equality Unequality And Or
    Not
    """.split()
)
_ASSUMPTIONS = frozenset({"positive", "integer", "nonnegative", "negative", "zero", "real", "finite", "nonzero"})
_REJECTED_FIELDS = frozenset(
    {"as_graph", "as_custom_obj", "as_operator", "custom_obj", "token", "as_string_to_argument"}
)
_OPEN = frozenset(
    {"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "range_constraints", "opset_version"}
)  # tables whose keys are names
_EMPTY = frozenset({"custom_obj_values", "treespec_namedtuple_fields"})


def parse_program_json(text: bytes) -> dict[str, Any]:
    """Allowed content of a program's JSON, as plain data for torch's reader. Raises Unlisted."""
    try:
        data = parse_strict_json(text)
    except (ValueError, RecursionError) as error:
        raise Unlisted("a program that is not JSON") from error
    require_or_unlisted(isinstance(data, dict), "a program that is no object")
    return _checked_value("", data, 0)


def _checked_value(key: str, value: Any, depth: int) -> Any:
    require_or_unlisted(depth < _DEEPEST, "values nested too deep")
    require_or_unlisted(key not in _REJECTED_FIELDS or value is None, f"`{key}`")
    if key in ("metadata", *_EMPTY):
        require_or_unlisted(key == "metadata" or value == {}, f"`{key}`")
        return {}
    if key == "guards_code":
        return []
    if isinstance(value, str):
        return _checked_text(key, value)
    if isinstance(value, list):
        return [_checked_value(key, item, depth + 1) for item in value]
    if isinstance(value, dict):
        for name in value:
            require_or_unlisted(
                _NAME.fullmatch(name) is not None and not keyword.iskeyword(name), f"the name {name[:40]!r}"
            )
        return {name: _checked_value("" if key in _OPEN else name, item, depth + 1) for name, item in value.items()}
    require_or_unlisted(value is None or isinstance(value, (bool, int, float)), "a value of another form")
    require_or_unlisted(not isinstance(value, int) or abs(value) < 1 << 63, "a number that is too large")
    return value


def _checked_text(key: str, text: str) -> str:
    check = _TEXTS.get(key)
    require_or_unlisted(text in _NUMBERS if check is None else check(text), f"the text {text[:60]!r} as `{key}`")
    return text


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and not keyword.iskeyword(text) and not text.startswith("__")


def _is_path(text: str) -> bool:
    return (
        _PATH.fullmatch(text) is not None
        and "__" not in text.split(".")
        and not any(part.startswith("__") for part in text.split("."))
    )


def _is_size_expression(text: str) -> bool:
    """Whether an expression over sizes is made of numbers, symbols and listed functions of them alone."""
    if len(text) > _LONGEST:
        return False
    try:
        tree = ast.parse(text, mode="eval").body
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    small = _is_allowed_term(tree) and sum(isinstance(node, ast.Call) for node in ast.walk(tree)) <= _MAX_TERMS
    return small and _depth(tree) <= _MAX_LEVELS and _polynomial_degree(tree) <= _MAX_DEGREE


def _depth(node: ast.AST) -> int:
    """Calls within each other."""
    return 1 + max(map(_depth, node.args), default=0) if isinstance(node, ast.Call) else 0


def _polynomial_degree(node: ast.AST) -> int:
    """The largest power of symbols that a term of an expression may have: sympy multiplies products out."""
    if not isinstance(node, ast.Call):
        return 0
    assert isinstance(node.func, ast.Name), "a term is called by its name"
    degrees = [_polynomial_degree(argument) for argument in node.args]
    match node.func.id:
        case "Symbol":
            return 1
        case "Mul":
            return sum(degrees)
        case "Pow":
            return 2 * degrees[0]
    return max(degrees, default=0)


def _is_allowed_term(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) is int and abs(node.value) < 1 << 63
    if isinstance(node, ast.UnaryOp):
        return (
            isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and _is_allowed_term(node.operand)
        )
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    name, keys = node.func.id, {k.arg for k in node.keywords}
    if name == "Pow":  # a large power is a large number
        if len(node.args) != 2:
            return False
        base, power = node.args
        return (
            not keys
            and _is_allowed_term(base)
            and isinstance(power, ast.Call)
            and ast.unparse(power) in ("Integer(2)", "Integer(-1)")
        )
    if name == "Symbol":
        return (
            len(node.args) == 1
            and isinstance(node.args[0], ast.Constant)
            and (isinstance(node.args[0].value, str) and _SYMBOL.fullmatch(node.args[0].value) is not None)
            and (
                keys <= _ASSUMPTIONS
                and all(isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool) for k in node.keywords)
            )
        )
    return name in _SUMS and not keys and all(map(_is_allowed_term, node.args))


def _is_plain_tree_spec(text: str) -> bool:
    """Whether a description of nested arguments has tuples, lists and dicts with names alone."""
    try:
        version, spec = parse_strict_json(text)
    except (ValueError, TypeError, RecursionError):
        return False
    return version == 1 and _is_tree_spec(spec, 0)


def _is_tree_spec(spec: Any, depth: int) -> bool:
    if not isinstance(spec, dict) or set(spec) != {"type", "context", "children_spec"} or depth > _DEEPEST:
        return False
    kind, context, children = spec["type"], spec["context"], spec["children_spec"]
    if not (kind is None or isinstance(kind, str)) or kind not in _TREES or not isinstance(children, list):
        return False
    if kind == "builtins.dict":
        try:
            names = parse_strict_json(context)
        except (ValueError, TypeError):
            return False
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_name(name) for name in names):
            return False
    elif context not in (None, "null"):
        return False
    return all(_is_tree_spec(child, depth + 1) for child in children)


_TEXTS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("name", "as_name", "forward_arg_names", "user_input_name"), _is_name),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "fqn"), _is_path),
    **dict.fromkeys(("in_spec", "out_spec"), _is_plain_tree_spec),
    "target": is_allowed_operator,
    "expr_str": _is_size_expression,
    "as_string": lambda text: _TEXT.fullmatch(text) is not None,
    "as_strings": lambda text: _TEXT.fullmatch(text) is not None,
    "type": lambda text: text in _DEVICES,
    "verifiers": lambda text: text in ("TRAINING", "ATEN"),
    "torch_version": lambda text: len(text) < 80,
}
