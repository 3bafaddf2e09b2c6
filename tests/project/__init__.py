"""Tests of the repository itself: imports, pages, links, tables."""
