"""The method: plan, target, loss, EMAs, restarts. Pure functions on tensors; models come in as callables."""
