"""Python processes patched from outside by a `sitecustomize` on their path: the product has no door for tests."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

SITE = """
import importlib.abc, importlib.machinery, os, signal, sys, time

PATCHES = {patches!r}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            exec(PATCHES[name], {{**globals(), "module": module}})

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def write_site(folder: Path, patches: Mapping[str, str]) -> Path:
    """A folder for PYTHONPATH: what is run after a module, by its name, is imported; it finds it as `module`."""
    folder.mkdir()
    codes = {name: textwrap.dedent(code) for name, code in patches.items()}
    (folder / "sitecustomize.py").write_text(SITE.format(patches=codes), encoding="utf-8")
    return folder
