"""A chart as inline SVG, in the page's own colours, drawn by Vega-Lite without a network.

Each is drawn twice, wide and narrow: scaling one would scale its letters. Colours are CSS variables, so a page in the
dark draws the same SVG. What Vega writes is taken apart and put together again from the elements and attributes that
a chart has, so nothing that a manifest says can become markup.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from ...core.environment import check_modules

WIDE, NARROW = 760, 330
SVG = "http://www.w3.org/2000/svg"
TAGS = frozenset({"svg", "g", "path", "line", "rect", "text", "tspan", "circle"})
ATTRIBUTES = frozenset(
    {
        *("aria-label", "cx", "cy", "d", "dx", "dy", "fill", "fill-opacity", "font-size", "font-style", "font-weight"),
        *("height", "opacity", "r", "rx", "ry", "stroke", "stroke-dasharray", "stroke-linecap", "stroke-opacity"),
        *("stroke-width", "text-anchor", "transform", "viewBox", "width", "x", "x1", "x2", "y", "y1", "y2"),
    }
)
_NUMBER = re.compile(r"-?\d+\.\d{3,}(?:e-?\d+)?")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "inherit",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": 500,
        "titlePadding": 10,
        "labelPadding": 6,
        "domain": False,
        "ticks": False,
        "gridColor": "var(--line)",
        "tickCount": 5,
    },
    "axisX": {"grid": False, "domain": True, "domainColor": "var(--line)"},
    "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": 0, "titleY": -14},
    "legend": {
        "labelColor": "var(--muted)",
        "labelFontSize": 12,
        "title": None,
        "orient": "bottom",
        "symbolSize": 70,
        "symbolStrokeWidth": 0,
        "columns": 0,
    },
}


HUES = tuple(f"var(--{name})" for name in ("accent", "second", "third", "fourth", "fifth", "sixth", "seventh"))


@dataclass(frozen=True)
class Chart:
    """A drawing, what it says in a sentence, and the numbers that it is drawn of."""

    title: str
    label: str  # for those who don't see it
    wide: str
    narrow: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def check_packages() -> None:
    check_modules(("jinja2", "vl_convert"), "report", "a report")


def render_chart(
    title: str,
    description: str,
    spec: Mapping[str, Any],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    height: int = 280,
    note: str = "",
) -> Chart:
    """Draw a Vega-Lite specification whose data is inside it."""
    wide, narrow = (_render_svg(spec, width, height) for width in (WIDE, NARROW))
    return Chart(title, description, wide, narrow, tuple(head), tuple(map(tuple, rows)), note)


def quantitative_encoding(field: str, title: str | None, **properties: Any) -> dict[str, Any]:
    """A field of numbers along one side."""
    return {"field": field, "type": "quantitative", "title": title, **properties}


def color_encoding(names: Sequence[str]) -> dict[str, Any]:
    """A colour for every name, in the order in which they come; a legend where there are several."""
    known = list(dict.fromkeys(names))
    scale = {"domain": known, "range": [HUES[i % len(HUES)] for i in range(len(known))]}
    return {"field": "kind", "type": "nominal", "scale": scale, "legend": {} if len(known) > 1 else None}


def point_mark(size: int, **properties: Any) -> dict[str, Any]:
    """A mark of that many square pixels, which says the field `says` where it is pointed at."""
    return {"type": "point", "filled": True, "size": size, "opacity": 1, **properties}


FIELD_LABELS = {"field": "says"}  # the encoding `description`


def _render_svg(spec: Mapping[str, Any], width: int, height: int) -> str:
    import vl_convert

    full_spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": width,
        "height": height if width == WIDE else round(height * 0.9),
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": {"left": 4, "right": 10, "top": 4, "bottom": 4},
        "config": CONFIG,
        **_xml_texts(spec),
    }
    return sanitize_svg(vl_convert.vegalite_to_svg(full_spec, allowed_base_urls=[]))


def _xml_texts(value: Any) -> Any:
    """A specification whose texts XML can hold: where one can't, vl-convert ends the process."""
    if isinstance(value, str):
        return _NOT_XML.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_xml_texts(name): _xml_texts(entry) for name, entry in value.items()}
    return [_xml_texts(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def sanitize_svg(svg: str) -> str:
    """Sanitised drawing: known elements and attributes alone, numbers with two decimals."""
    root = ElementTree.fromstring(svg)
    _remove_unlisted_svg(root)
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode").replace(f' xmlns="{SVG}"', "", 1)


def _remove_unlisted_svg(element: ElementTree.Element) -> None:
    for child in list(element):
        tag = child.tag.removeprefix(f"{{{SVG}}}") if isinstance(child.tag, str) else ""
        if tag not in TAGS or child.get("opacity") == "0" or child.get("display") == "none":
            element.remove(child)
            continue
        _remove_unlisted_svg(child)
        if tag == "g" and not len(child):
            element.remove(child)
    for name, value in list(element.attrib.items()):
        if name not in ATTRIBUTES or (name == "aria-label" and element.get("aria-roledescription") == "axis"):
            del element.attrib[name]
        elif name in ("d", "transform", "x", "y", "x2", "y2", "width", "height"):
            element.set(name, _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value))
