"""Tests of the mathematics: arrays in, arrays out."""
