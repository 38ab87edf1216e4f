"""Fused Triton kernels, each beside its plain PyTorch reference, and the choice of an attention backend."""
