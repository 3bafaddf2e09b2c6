"""Benchmarks: bnjax beside its peers."""
