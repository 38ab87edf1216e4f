"""The method: plan, target, loss, EMAs, restarts. Pure functions on tensors; models are passed in as callables."""
