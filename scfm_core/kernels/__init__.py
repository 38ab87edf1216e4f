"""Fused Triton kernels, their plain PyTorch references, and the choice of an attention backend."""
