"""Benchmarks that run programs and time them."""
