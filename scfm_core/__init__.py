"""scfm: turns a pre-trained flow-matching model into a few-step sampler by shortcut self-distillation."""

__version__ = "0.2.0"
