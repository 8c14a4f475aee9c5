"""Triton kernels, shipped as `ttt_cache.kernels`. Imports torch, triton and itself only."""
