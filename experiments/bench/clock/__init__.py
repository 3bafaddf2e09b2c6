"""Benchmarks that run programs and measure time."""
