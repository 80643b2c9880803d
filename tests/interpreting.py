"""Triton's interpreter, in a third of the time: the same functions and checks, without what repeats itself."""

import functools
import importlib.util
from typing import Any

import numpy as np


def hasten() -> None:
    """Replace what Triton's interpreter spends most of its time on. Measured on the tests of the optimizers' memory and
    of the convolution's kernels, in seconds: as it is 41 and 62, patched once a launch 22 and 50, all three 17 and 27.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, call = interpreter._patch_lang, interpreter.InterpretedFunction.__call__
    numpys_type = functools.cache(interpreter._get_np_dtype)  # of a scalar type; others can't be looked up
    within = False

    def patch_unless_patched(function: Any) -> Any:
        """At every call of a device function the interpreter looks through triton.language for what to replace.

        What a launch has put there stands until it ends.
        """
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if within and all(language.static_print is print for language in languages):
            return None
        return patch(function)

    def call_within(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal within
        before, within = within, True
        try:
            return call(self, *arguments, **options)
        finally:
            within = before

    interpreter._patch_lang = patch_unless_patched
    interpreter.InterpretedFunction.__call__ = call_within
    interpreter._get_np_dtype = lambda kind: np.dtype(np.uint64) if kind.scalar.is_ptr() else numpys_type(kind.scalar)
    # Its check of integers for overflow takes eight operations for one, and says nothing unless `debug` is set.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
