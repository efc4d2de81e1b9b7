"""Processes that the benchmarks start, and what they measure themselves with."""
