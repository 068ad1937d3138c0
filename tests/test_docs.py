"""What the documentation says is so: the tree of files, the table of families, links, commands and flags."""

from __future__ import annotations

import re
import shlex

import click
import pytest

from surgery.cli.main import main
from surgery.formats.registry import FORMATS
from tests import matrix, tiny
from tests.tree import ROOT, TREES, files, packages, replaced, says

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "merge_configs").glob("*.md")])


@pytest.mark.parametrize("page", TREES)
def test_the_trees_are_the_tree(page):
    assert replaced(page) == (ROOT / page).read_text(), "run `python -m tests.tree`"
    assert [str(p) for p in [*files(), *(p / "__init__.py" for p in packages())] if not says(p)] == []


@pytest.mark.parametrize(("page", "yes"), [("README.md", "✓"), ("docs/formats/families.md", "exact")])
def test_the_table_of_families_is_what_the_tests_convert(page, yes):
    text = (ROOT / page).read_text()
    rows = {cells[0]: cells[1:] for cells in table(text, "| model |")}
    names = next(iter(table(text, "| model |", head=True)))[1:]
    held = {tuple(sorted(k for k, v in zip(names, cells, strict=True) if v == yes)) for cells in rows.values()}
    assert set(names) == set(FORMATS)
    assert held == {tuple(sorted(("hf", *formats))) for formats in matrix.HOLDS.values()}
    said = " ".join(rows)
    missing = [f for f in tiny.FAMILIES if f"`{tiny.FAMILIES[f][0]}`" not in said]
    assert missing == []


def table(text: str, start: str, head: bool = False) -> list[list[str]]:
    lines = text[text.index(start) :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return rows[:1] if head else rows[2:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    dead = [x for x in links if not x.startswith(("http:", "https:")) and not (page.parent / x).exists()]
    assert dead == []


def commands() -> list[tuple[str, str]]:
    """Every `surgery ...` line of a shell example, in pages and in what the commands say of themselves."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.S):
            joined = block.replace("\\\n", " ")
            found += [(page.name, line.strip()) for line in joined.splitlines() if line.strip().startswith("surgery ")]
    for path in sorted((ROOT / "surgery" / "cli").glob("*.py")):
        for line in re.findall(r"^ *(surgery [a-z]+ .*)$", path.read_text(), re.M):
            found.append((path.name, re.split(r"\s{2,}", line)[0]))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_examples_use_commands_and_flags_that_exist(page, line):
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"{page}: there is no command {words[0]}"
        command, words = found, words[1:]
    flags = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help", "--version"}
    assert [w for w in words if w.startswith("-") and w.split("=")[0] not in flags] == []
    if "--to" in words and "<" not in line:
        assert words[words.index("--to") + 1] in FORMATS


def test_every_format_has_a_page():
    for name in FORMATS:
        page = ROOT / "docs" / "formats" / f"{name.removesuffix('-dist')}.md"
        assert page.exists()
        text = page.read_text()
        missing = [o.name for o in FORMATS[name].options if f"`{o.name}`" not in text and f"{o.name}=" not in text]
        assert missing == [], f"{page.name} does not name these options"
