"""Shared by the tests: the oracle, the tables of cases, ways to split a batch over devices, processes."""
