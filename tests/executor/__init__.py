"""Executes what Triton compiled for sm_80 and sm_90, thread by thread, on the CPU.

with executed("sm_80") as report:
    y = tribp.linear_sigmoid(x, w, b)  # CPU tensors
report.check()
print(report.table())
"""

from .run import Report, executed

__all__ = ["Report", "executed"]
