"""What people do with batch normalization today: each use a claim, a command, and a verdict by the rule of `claims`."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
