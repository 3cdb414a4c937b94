"""Grids of runs: plan and runner."""
