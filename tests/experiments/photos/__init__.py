"""Tests of the data pipeline for photographs."""
