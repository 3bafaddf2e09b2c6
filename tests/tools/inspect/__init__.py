"""Tests of the table of layers: its columns, which channels are idle, the order of the rows, and the displays."""
