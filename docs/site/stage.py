"""Pages of the site as one folder: those of the repository with their links, and those that are generated.

    python docs/site/stage.py build/docs

Ends with 1 and a line for each link that leads nowhere and each page that the navigation lacks.
"""

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path, PurePosixPath

from reference import reference_pages

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
INFO = re.compile(r"^```(\w+) (?!title=)(.+)$", re.M)  # a fence's words, which the manual's tests read
SITE = ROOT / "docs" / "site"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
CONFIG = ROOT / "zensical.toml"


def site_path(path: str) -> str:
    """Path in the site of a path in the repository: docs/ is its root, README its first page."""
    if path == "README.md":
        return "index.md"
    suites = "dsl/suites/"
    return path.replace(suites, "reference/manual/") if path.startswith(suites) else path.removeprefix("docs/")


def sources() -> list[str]:
    """Pages of the repository, without those that are notes to a folder."""
    patterns = ("*.md", "docs/**/*.md", "dsl/suites/*.md")
    return sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})


def with_site_links(text: str, page: str, files: set[str], lost: list[str]) -> str:
    """A page whose links lead to places in the site. Files that are no pages join `files`; others `lost`."""
    here = PurePosixPath(site_path(page)).parent

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(PurePosixPath(page).parent / match[1])
        if target.startswith("docs/reference/"):  # generated: compared by the build
            return match[1]
        if not (ROOT / target).is_file():
            lost.append(f"{page}: `{match[1]}` leads nowhere")
        files.add(target)
        return os.path.relpath(site_path(target), here)

    return LINK.sub(moved, INFO.sub(r'```\1 title="\2"', text))


def notebook_page(path: Path) -> str:
    """A notebook as Markdown, with its file to take along."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    shown = {"markdown": "{}", "code": "```python\n{}\n```"}
    title, *texts = [shown[cell["cell_type"]].format("".join(cell["source"])) for cell in cells]
    return "\n\n".join([title, f"[{path.name}]({path.name}) is this page as a notebook.", *texts]) + "\n"


def pages_of(nav: list | dict | str) -> list[str]:
    """Pages of a navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(item)]


def stage(into: Path) -> list[str]:
    """Write all pages and what they show into a folder. Returns a line for each fault.

    What a folder below `build/` had before is removed; one outside of the repository has to be empty.
    """
    target = into.resolve()
    is_in_use = target.is_relative_to(ROOT) or (target.is_dir() and any(target.iterdir()))
    if ROOT / "build" not in target.parents and is_in_use:
        return [f"{into} has other files than these pages: name a folder below build/, or an empty one elsewhere"]
    lost: list[str] = []
    files: set[str] = set()
    pages = {
        site_path(name): with_site_links((ROOT / name).read_text("utf-8"), name, files, lost) for name in sources()
    }
    pages |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in NOTEBOOKS} | reference_pages()
    shutil.rmtree(into, ignore_errors=True)
    for name, text in pages.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_text(text, "utf-8")
    for name in sorted(files - {*sources()}):
        if (ROOT / name).is_file():
            (into / site_path(name)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, into / site_path(name))
    for asset in (*SITE.glob("*.css"), *SITE.glob("*.js"), *NOTEBOOKS):
        shutil.copyfile(asset, into / ("notebooks" if asset in NOTEBOOKS else "") / asset.name)
    nav = pages_of(tomllib.loads(CONFIG.read_text("utf-8"))["project"]["nav"])
    lost += [f"zensical.toml: the navigation lacks {name}" for name in pages if name not in nav]
    return lost + [f"zensical.toml: there is no page {name}" for name in nav if name not in pages]


if __name__ == "__main__":
    faults = stage(Path(sys.argv[1]))
    sys.exit("\n".join(faults) if faults else 0)
