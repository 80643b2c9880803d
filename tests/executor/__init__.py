"""Executes what Triton compiled for sm_80 and sm_90, thread by thread, on the CPU: checks what compute-sanitizer would, and counts what a profiler would."""
