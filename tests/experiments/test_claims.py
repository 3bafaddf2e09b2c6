"""Tests the rule of the verdicts, and that pages and README say of the committed lines what the rule says."""

import importlib
import re

import numpy as np
import pytest
from scipy import stats

from experiments import __main__ as listing
from experiments import jsonl
from experiments.repro import claims, study
from experiments.repro.claims import Claim, decide, first_step, last, of
from tests.support.programs import ROOT

NEAR, FAR, MIXED = [1.0, 1.1, 0.9, 1.2, 0.8], [5.0, 5.2, 4.8, 5.1, 4.9], [-4.0, 5.0, -3.0, 4.0, 1.0]
STUDIES = {
    path.with_suffix(""): ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("experiments/*/*.py"))
    if "\nSTUDY = " in path.read_text() and (path.parent / "results" / f"{path.stem}.jsonl").exists()
}


def lines_of(values, setting="a"):
    """Returns lines in which a setting has these values at the end, by seed."""
    return [{"setting": setting, "seed": seed, "step": 1, "accuracy": value} for seed, value in enumerate(values)]


def both(sign, margin=0.0):
    return Claim("a and b", last("a", "accuracy"), sign, last("b", "accuracy"), margin)


@pytest.mark.parametrize(
    ("differences", "sign", "margin", "verdict"),
    [
        (NEAR, ">", 0, "holds"),
        (NEAR, "<", 0, "does not hold"),
        (MIXED, ">", 0, "undecided"),
        (NEAR[:4], ">", 0, "undecided"),  # too few seeds
        (NEAR, "=", 2, "holds"),
        (NEAR, "=", 1, "undecided"),  # the interval reaches beyond the margin
        (FAR, "=", 2, "does not hold"),
        ([0.0] * 5, "=", 0, "holds"),
        ([0.0] * 5, "<", 0, "undecided"),
    ],
)
def test_the_rule(differences, sign, margin, verdict):
    lines = lines_of(np.array(differences) + 7) + lines_of([7.0] * len(differences), "b")
    assert decide(both(sign, margin), lines).verdict == verdict


def test_the_interval_is_that_of_student():
    found = decide(both(">"), lines_of(NEAR) + lines_of([0.0] * 5, "b"))
    low, high = stats.ttest_1samp(NEAR, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-12)


def test_only_seeds_with_both_settings_are_pairs():
    lines = lines_of(NEAR) + lines_of([0.0] * 2, "b")
    assert len(decide(both(">"), lines).differences) == 2
    assert str(decide(both(">"), lines_of(NEAR))) == "not measured"


@pytest.mark.parametrize(
    ("signs", "verdict"),
    [(">", "holds"), ("><", "in part"), ("<", "does not hold"), (">=", "in part"), ("=", "undecided")],
)
def test_the_verdict_on_several_claims(signs, verdict):
    lines = lines_of(NEAR) + lines_of([0.0] * 5, "b")
    text = claims.verdict([both(sign, 1.0) for sign in signs], lines)
    assert text.startswith(f"**{verdict}**, 5 seeds") and text.endswith("a and b: +1 (+0.804 to +1.2)")


def test_measures():
    lines = [{"setting": "a", "seed": 0, "step": step, "accuracy": step / 10} for step in (1, 2, 3)]
    assert of("a", "accuracy", np.max)(lines) == last("a", "accuracy")(lines) == 0.3
    assert first_step("a", 0.15)(lines) == 2
    assert first_step("a", 0.9)(lines) == 3  # never: the last step
    assert np.isnan(last("b", "accuracy")(lines))


def test_spread_is_the_sample_deviation():
    assert study.spread([1.0, 3.0], 2) == f"2.00 ± {2**0.5:.2f}" and study.spread([1.0], 2) == "1.00"


@pytest.mark.parametrize("name", STUDIES.values())
def test_a_page_says_what_the_rule_says_of_the_lines(name):
    """Checks that page, `python -m experiments` and README hold the verdict that the committed lines lead to."""
    module = importlib.import_module(name)
    folder = ROOT / "/".join(name.split(".")[:-1]) / "results"
    lines = jsonl.read(folder / f"{module.STUDY.name}.jsonl")
    page = study.report(module.STUDY, lines)
    assert (folder / f"{module.STUDY.name}.md").read_text().strip() == page
    assert page.startswith("**")
    short = name.removeprefix("experiments.")
    (row,) = [line for line in listing.README.read_text().splitlines() if f"| `{short}` |" in line]
    assert page.splitlines()[0] in row


def test_the_readme_is_up_to_date():
    assert listing.README.read_text() == listing.readme()
    assert set(re.findall(r"studies in (\w+)", listing.README.read_text())) == {"repro", "article", "gallery"}
