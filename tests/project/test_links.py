"""Tests that every relative link in a Markdown file leads to an existing file and, where named, heading."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")])


def prose(file):
    """Returns the text of a file without code blocks and inline code, which hold no links or headings."""
    return re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S)


def links(file):
    """Returns the targets of links and pictures, without those on other hosts."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(file)))
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors(file):
    """Returns the anchors that GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", prose(file), re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links(file):
    for target in links(file):
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{target}: no such file"
        assert there.is_relative_to(ROOT), f"{target}: outside of the repository"
        assert not anchor or anchor in anchors(there), f"{target}: the headings are {sorted(anchors(there))}"


def test_the_check_sees_links_and_headings():
    assert "docs/guides/controls.md" in links(ROOT / "README.md")
    assert "ε-应在根号之内" in anchors(ROOT / "docs" / "article.zh.md")
    assert "no-pallas-kernel" in anchors(ROOT / "experiments" / "bench" / "README.md")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands(file):
    """Checks that each program a page names can be started."""
    for name in sorted(set(re.findall(r"python -m (experiments(?:\.\w+)*)", file.read_text()))):
        spec = importlib.util.find_spec(name)
        assert spec and spec.has_location, f"{file.name} names {name}"  # an old command has no file
