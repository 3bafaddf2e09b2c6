"""Adaptation at test time, and teachers that follow a student."""
