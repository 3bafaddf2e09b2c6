"""Tests of the functional core, whose functions take and return arrays."""
