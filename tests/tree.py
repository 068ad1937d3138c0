"""The tree of files in the README, a line each: `python -m tests.tree` renews it from the files' own first lines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("surgery", "recipes", "merge_configs", "bench", "docs", "tests")
DTYPES = (".py", ".sh", ".yaml", ".yml", ".md")
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->"


def files() -> list[Path]:
    """Every file that the tree lists, relative to the root: code, recipes, docs and tests, no data."""
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in DTYPES)
    kept: Iterable[Path] = (p.relative_to(ROOT) for p in found if p.name != "__init__.py" or p.stat().st_size)
    kept = (p for p in kept if not {"golden", "__pycache__"} & set(p.parts))
    return sorted(kept, key=lambda p: (FOLDERS.index(p.parts[0]), p.parent.as_posix(), p.name != "__init__.py", p.name))


def says(path: Path) -> str:
    """What a file says of itself: the first line of its docstring, comment or page.  "" if it says nothing."""
    lines = (ROOT / path).read_text().splitlines()
    if lines and lines[0].startswith("#!"):
        lines = lines[1:]
    first = next((line for line in lines if line.strip("# ")), "")
    return first.removeprefix('r"""').removeprefix('"""').removesuffix('"""').lstrip("# ").strip()


def tree() -> str:
    """The tree as the README shows it."""
    out, folder = [], ""
    for path in files():
        if path.parent.as_posix() != folder:
            folder = path.parent.as_posix()
            out.append(f"{folder}/")
        out.append(f"  {path.name:24}  {says(path)}")
    return "```text\n" + "\n".join(out) + "\n```\n"


def replaced(readme: str) -> str:
    """The README with the tree as it is now."""
    return re.sub(rf"(?s)(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", lambda _: tree(), readme)


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(replaced(page.read_text()))
