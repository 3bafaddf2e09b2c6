"""Tests of the functions on variable trees."""
