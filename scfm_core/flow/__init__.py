"""The flow: noise convention, sigma grids, Euler sampling, counter-based randomness. Imports only torch."""
