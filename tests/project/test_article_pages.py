"""The two pages about the article: whole, the same in both languages, and with the numbers of the committed results."""

import ast
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"English": DOCS / "article.md", "中文": DOCS / "article.zh.md"}
# Of the article; 5.1 to 5.3 are its three directions.
SECTIONS = ["1", "2", "2.1", "2.2", "2.3", "3", "3.1", "3.2", "4", "4.1", "4.2", "5", "5.1", "5.2", "5.3", "6"]
FORMULAS = "μ = (1/m) Σ xᵢ", "σ² = (1/m) Σ (xᵢ − μ)²", "yᵢ = (xᵢ − μ)/σ + ε", "μ_new", "σ²_new"


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def measured(text):
    """The bold numbers of each paragraph and each row of a table, with the tables of results that it links to."""
    chunks = [part for chunk in text.split("\n\n") for part in (chunk.splitlines() if chunk[0] == "|" else [chunk])]
    found = [(re.findall(r"\*\*([+-]?[\d.,]+)\*\*", chunk), links(chunk)) for chunk in chunks if chunk]
    return [
        (numbers, [DOCS / link for link in here if re.search(r"/results/.*md$", link)])
        for numbers, here in found
        if numbers
    ]


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_section_formula_and_question_has_its_place(page):
    text = page.read_text()
    assert re.findall(r"^##+ ([\d.]+) ", text, re.M) == SECTIONS
    assert all(formula in text for formula in FORMULAS)
    questions = text[text.index("\n## 6 ") :]
    assert re.findall(r"^\| (\d)\. ", questions, re.M) == ["1", "2", "3", "4"]


def test_both_languages_have_the_same_code_links_and_numbers():
    english, chinese = (page.read_text() for page in PAGES.values())
    assert len(blocks(english)) == len(blocks(chinese)) > 10
    for one, other in zip(blocks(english), blocks(chinese), strict=True):
        assert ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))
    outward = [sorted(link for link in links(text) if not re.match(r"#|article", link)) for text in (english, chinese)]
    assert outward[0] == outward[1]
    assert [sorted(numbers) for numbers, _ in measured(english)] == [sorted(n) for n, _ in measured(chinese)]


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_bold_number_stands_in_the_table_that_is_linked_beside_it(page):
    found = measured(page.read_text())
    assert len(found) > 10
    for numbers, tables in found:
        assert tables, f"{numbers}: no table of results is linked in this paragraph"
        known = set(re.findall(r"[+-]?\d[\d.,]*\d|\d", " ".join(table.read_text() for table in tables)))
        assert set(numbers) <= known, f"{set(numbers) - known} stand in none of {[table.name for table in tables]}"
