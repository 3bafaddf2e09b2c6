"""Tests of reading files of other libraries."""
