"""Decides claims by a rule in code: a paired comparison over at least five seeds, with a confidence interval.

A claim says of two numbers, both measured in the runs of one seed, that the first is smaller, or larger, or that they
differ by less than a margin. It stands in the module of its study before the runs that decide it.

Rule: d is the difference of a seed's two numbers, and the interval the 95 % one of Student's t for the mean of d.
"<" holds where the whole interval lies below 0 and does not hold where it lies above; ">" the other way around. "="
holds where the interval lies within ± margin, and does not hold where it lies outside. Everything else, and every
comparison of fewer than five seeds, is undecided. Each interval stands for itself: with twenty claims expect one that
is wrong.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from experiments.jsonl import Line

LEAST = 5  # seeds that a verdict takes
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
Measure = Callable[[list[Line]], float]  # from the lines of one seed, of all settings; NaN where there are none


class Claim(NamedTuple):
    """Says how one number of a seed compares with another one."""

    text: str
    a: Measure
    sign: Literal["<", ">", "="]
    b: Measure
    margin: float = 0.0  # of "=": the differences that do not matter


class Found(NamedTuple):
    """Holds what the lines say of one claim."""

    differences: np.ndarray  # a − b, [seeds]
    low: float  # of the 95 % interval of their mean; NaN for fewer than two seeds
    high: float
    verdict: str

    def __str__(self) -> str:
        """Returns the mean difference with its interval."""
        if not len(self.differences):
            return "not measured"
        mean = signed(self.differences.mean())
        return mean if np.isnan(self.low) else f"{mean} ({signed(self.low)} to {signed(self.high)})"


def last(setting: str, name: str) -> Measure:
    """Returns a measure: the value called `name` in the last line of a setting that has one."""
    return of(setting, name, lambda values: values[-1])


def of(setting: str, name: str, reduce: Callable[[np.ndarray], float]) -> Measure:
    """Returns a measure: `reduce` of the values called `name` in the lines of a setting, in order `[T, ...]`."""

    def measure(lines: list[Line]) -> float:
        values = [line[name] for line in lines if line["setting"] == setting and name in line]
        return float(reduce(np.array(values))) if values else float("nan")

    return measure


def first_step(setting: str, level: float, name: str = "accuracy") -> Measure:
    """Returns a measure: the step after which `name` first reaches a level; the last step where it never does."""

    def measure(lines: list[Line]) -> float:
        here = [line for line in lines if line["setting"] == setting and name in line]
        return float(next((line["step"] for line in here if line[name] >= level), here[-1]["step"] if here else np.nan))

    return measure


def decide(claim: Claim, lines: list[Line]) -> Found:
    """Returns what the lines say of a claim, by the rule of this module."""
    seeds = sorted({line["seed"] for line in lines})
    by_seed = [[line for line in lines if line["seed"] == seed] for seed in seeds]
    found = np.array([claim.a(one) - claim.b(one) for one in by_seed])
    found = found[~np.isnan(found)]
    if len(found) < 2:
        return Found(found, np.nan, np.nan, UNDECIDED)
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    low, high = found.mean() - half, found.mean() + half
    return Found(found, low, high, _verdict(claim, low, high) if len(found) >= LEAST else UNDECIDED)


def _verdict(claim: Claim, low: float, high: float) -> str:
    """Returns the verdict on a claim whose difference lies between `low` and `high`."""
    if claim.sign == "=":
        holds, fails = -claim.margin <= low and high <= claim.margin, low > claim.margin or high < -claim.margin
    else:
        below, above = high < 0, low > 0
        holds, fails = (below, above) if claim.sign == "<" else (above, below)
    return HOLDS if holds else FAILS if fails else UNDECIDED


def verdict(claims: Sequence[Claim], lines: list[Line]) -> str:
    """Returns the verdict on a study in a sentence, and the first of its claims with the difference.

    All claims hold: "holds". Some do: "in part". None does: "does not hold" if one is refuted, else "undecided".
    """
    found = [decide(claim, lines) for claim in claims]
    counts = Counter(each.verdict for each in found)
    part = FAILS if counts[FAILS] else UNDECIDED
    whole = HOLDS if counts[HOLDS] == len(found) else "in part" if counts[HOLDS] else part
    words = {FAILS: "refuted", UNDECIDED: "undecided"}
    others = "".join(f", {counts[v]} {word}" for v, word in words.items() if counts[v])
    each = f" ({counts[HOLDS]} of {len(found)} hold{others})" if len(counts) > 1 else ""
    number = len({line["seed"] for line in lines})
    return f"**{whole}**, {number} seed{'s' * (number > 1)}{each}. {claims[0].text}: {found[0]}"


def table(claims: Sequence[Claim], lines: list[Line]) -> str:
    """Returns a table of the claims, a row for each."""
    text = ["| claim | a − b (95 % interval) | seeds that agree | verdict |", "|---|---|---|---|"]
    for claim in claims:
        found = decide(claim, lines)
        side = {"<": found.differences < 0, ">": found.differences > 0}
        agree = side.get(claim.sign, np.abs(found.differences) <= claim.margin).sum()
        what = f"{claim.text} (a = b ± {claim.margin:g})" if claim.sign == "=" else f"{claim.text} (a {claim.sign} b)"
        text.append(f"| {what} | {found} | {agree} of {len(found.differences)} | {found.verdict} |")
    return "\n".join(text)


def signed(value: float) -> str:
    """Formats a difference with its sign and three digits."""
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.3g}"
