"""Benchmarks that compare bnjax with other libraries."""
