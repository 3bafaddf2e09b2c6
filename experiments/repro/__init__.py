"""Reproductions of papers, a module each: `python -m experiments.repro.wu2018`."""
