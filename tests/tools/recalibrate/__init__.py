"""Tests recalibrate and collect_moments: values, calls in loops, programs and errors."""
