"""The pages for readers, as markdown: what blocks of code and which links they hold."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: A block of Python that is to be a file says so in its first line.
FILE_NAME = re.compile(r"# (\w+\.py)\n")


class Block(NamedTuple):
    """A block of code: the language that the page gives for it, and its text."""

    language: str
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """All blocks of a page; the language of one that is only indented is empty."""
    found = MarkdownIt().parse(page.read_text())
    return [Block(token.info.strip(), token.content) for token in found if token.type in ("fence", "code_block")]


def blocks_in(page: Path, language: str) -> list[str]:
    return [block.text for block in blocks(page) if block.language == language]


def links(page: Path) -> Iterator[str]:
    """Where links and pictures of a page lead, within the repository, without the heading."""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for part in token.children or ():
            target = str(part.attrGet("href") or part.attrGet("src") or "").partition("#")[0]
            if target and "://" not in target and not target.startswith("mailto:"):
                yield target


def write_files(page: Path, folder: Path) -> list[str]:
    """Write the blocks of a page that are to be files; return their names."""
    written = []
    for text in blocks_in(page, "python"):
        if named := FILE_NAME.match(text):
            (folder / named[1]).write_text(text)
            written.append(named[1])
    return written
