"""Tests of merging, resetting, copying and applying statistics, against moments of the rows and leaf by leaf."""
