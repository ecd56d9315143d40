"""Kernels for tokens before and after the products, of one source for Hopper and Blackwell GPUs: they quantise activations to
NVFP4, sort a router's choices by expert, and add up the experts' results."""
