"""Benchmarks: a file each, and their registry."""
