"""Adapts the links of Markdown files to the site, so that links that work on GitHub work there too.

A page that includes a file from outside of docs/, such as the README, gets its text, with links relative to the page. A
link to a file that is no page becomes a download; a link to a folder becomes its text.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.M)
# Code is matched first and left as it is, because `f[0](x)` is no link.
LINK = re.compile(r"^```.*?^```|`[^`\n]*`|\[([^\[\]]*)\]\(([^)\s]+)\)", re.M | re.S)


def on_source_read(app: Any, docname: str, source: list[str]) -> None:
    """Replaces the source of a Markdown page by its text with included files and adapted links."""
    page = DOCS / f"{docname}.md"
    if not page.exists():
        return

    def included(match: re.Match[str]) -> str:
        file = (page.parent / match[1]).resolve()
        app.env.note_dependency(str(file), docname=docname)
        return with_links(file.read_text(), file.parent, page)

    text = with_links(source[0], page.parent, page)
    source[0] = INCLUDE.sub(included, text)


def with_links(text: str, folder: Path, page: Path) -> str:
    """Returns the Markdown of a file in `folder`, with its links relative to `page`."""

    def rewritten(match: re.Match[str]) -> str:
        label, target = match.groups()
        if target is None or re.match(r"#|\w+:", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        file = (folder / path).resolve()
        if file.is_dir():
            return label
        is_picture = match.string[match.start() - 1 : match.start()] == "!"
        shown = pages().get(file) or (file if is_picture else None)
        if shown is None:
            return f"[{label}](path:{os.path.relpath(file, page.parent)})"
        return f"[{label}]({os.path.relpath(shown, page.parent)}{hash_}{anchor})"

    return LINK.sub(rewritten, text)


@cache
def pages() -> dict[Path, Path]:
    """Returns the page that shows each file: the file itself in docs/, or the page that includes it."""
    found = {file: file for pattern in ("*.md", "*.rst", "*.ipynb") for file in DOCS.rglob(pattern)}
    for page in DOCS.rglob("*.md"):
        for included in INCLUDE.findall(page.read_text()):
            found[(page.parent / included).resolve()] = page
    return found


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", on_source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
