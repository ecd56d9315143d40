"""The Hopper backend: NVFP4 weights decoded exactly in registers, wgmma with 16-bit tokens from shared memory."""
