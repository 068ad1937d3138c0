"""The trees of files in the docs, a line each: `python -m tests.tree` renews them from the files' own first lines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("surgery", "recipes", "merge_configs", "bench", "docs", "tests")
SUFFIXES = (".py", ".sh", ".yaml", ".yml", ".md")
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->"


def files() -> list[Path]:
    """Every file that the long tree lists, relative to the root: code, recipes, docs and tests, no data."""
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES)
    kept: Iterable[Path] = (p.relative_to(ROOT) for p in found if p.name != "__init__.py" or p.stat().st_size)
    kept = (p for p in kept if not {"golden", "__pycache__"} & set(p.parts))
    return sorted(kept, key=lambda p: (FOLDERS.index(p.parts[0]), p.parent.as_posix(), p.name != "__init__.py", p.name))


def packages() -> list[Path]:
    """The packages of surgery/, in the order in which they build on each other."""
    from tests.test_imports import LADDER

    return [Path("surgery") / name for name in LADDER if (ROOT / "surgery" / name).is_dir()]


def says(path: Path) -> str:
    """What a file says of itself: the first line of its docstring, comment or page.  "" if it says nothing."""
    lines = (ROOT / path).read_text().splitlines()
    if lines and lines[0].startswith("#!"):
        lines = lines[1:]
    first = next((line for line in lines if line.strip("# ")), "")
    return first.removeprefix('r"""').removeprefix('"""').removesuffix('"""').lstrip("# ").strip()


def long_tree() -> str:
    """All files, as docs/tree.md shows them."""
    out, folder = [], ""
    for path in files():
        if path.parent.as_posix() != folder:
            folder = path.parent.as_posix()
            out.append(f"{folder}/")
        out.append(f"  {path.name:24}  {says(path)}")
    return "```text\n" + "\n".join(out) + "\n```\n"


def short_tree() -> str:
    """The packages, as the README shows them."""
    lines = [f"{path.name + '/':14} {says(path / '__init__.py')}" for path in packages()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


TREES = {"README.md": short_tree, "docs/tree.md": long_tree}


def replaced(page: str) -> str:
    """A page with its tree as it is now."""
    text = (ROOT / page).read_text()
    return re.sub(rf"(?s)(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", lambda _: TREES[page](), text)


if __name__ == "__main__":
    for page in TREES:
        (ROOT / page).write_text(replaced(page))
