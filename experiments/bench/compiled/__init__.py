"""Benchmarks that compile programs and analyse them, without running them."""
