"""The engine for CUDA devices, asked for when the first array on one is updated."""
