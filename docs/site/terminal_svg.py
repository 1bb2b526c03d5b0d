"""Draws a recorded terminal session: lines that begin with `$ ` are what was typed.

python docs/site/terminal_svg.py docs/data/session.txt docs/session.svg
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, LINE, LETTER, EDGE = 104, 17, 7.25, 16  # letters in a line; the others in pixels
STYLE = (
    "text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#cbd5e1;white-space:pre}"
    ".typed{fill:#f8fafc;font-weight:600}.prompt{fill:#2dd4bf}"
)


def drawing(session: str) -> str:
    """SVG of a session, each line cut to the window's width."""
    lines = [line[:WIDTH] for line in session.rstrip("\n").splitlines()]
    width, height = round(WIDTH * LETTER + 2 * EDGE), len(lines) * LINE + 2 * EDGE
    texts = []
    for number, line in enumerate(lines, 1):
        typed = line.startswith("$ ")
        content = f'<tspan class="prompt">$ </tspan>{escape(line[2:])}' if typed else escape(line)
        kind = ' class="typed"' if typed else ""
        texts.append(f'<text x="{EDGE}" y="{EDGE + number * LINE - 4}" xml:space="preserve"{kind}>{content}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    ground = f'<rect width="{width}" height="{height}" rx="8" fill="#0f172a"/>'
    return "\n".join([f'{head} role="img">', f"<style>{STYLE}</style>", ground, *texts, "</svg>\n"])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(drawing(Path(sys.argv[1]).read_text("utf-8")), "utf-8")
