"""Engines: who holds the weights, runs the backward and applies the optimizer. Imports no sibling package."""
