"""How kernels are launched: settings and their reasons, tensors as kernels read them, repeated calls, tuning."""
