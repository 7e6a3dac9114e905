"""Damaged files and interrupted runs: what holds when things go wrong."""
