"""How kernels are launched: configs and heuristics, plans of launches, tuning."""
