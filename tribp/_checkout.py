"""Finds the kernels in a checkout without symbolic links. Imported before anything else of tribp.

In a checkout `tribp/kernels` is a link to `kernels/`. Git without links (its default on Windows) writes a file with the
link's target in its place; an import would miss it, or find the kernels of another checkout that is installed.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

link = Path(__file__).with_name("kernels")
if link.is_file():
    spec = ModuleSpec("tribp.kernels", None, is_package=True)
    spec.submodule_search_locations = [str((link.parent / link.read_text()).resolve())]
    kernels = sys.modules[spec.name] = module_from_spec(spec)
    vars(sys.modules["tribp"])["kernels"] = kernels
