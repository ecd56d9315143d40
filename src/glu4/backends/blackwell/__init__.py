"""The Blackwell backend: NVFP4 tokens and weights multiplied by tcgen05's block-scaled MMA. Run in emulation only so far."""
