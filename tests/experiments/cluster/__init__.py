"""Tests of how the processes of a run find and meet each other."""
