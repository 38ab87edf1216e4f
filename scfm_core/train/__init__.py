"""Training: configuration, the step and the loop, checkpoints, metrics, validation samples, estimates."""
