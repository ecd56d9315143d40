"""What a router's choice costs around a mixture of experts, in kernels that are the same on Hopper and Blackwell GPUs."""
