"""Runs: what a person starts. Nothing imports this package."""
