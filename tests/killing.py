"""Python processes in which images with a damaged header reach DALI, and what then becomes of the process.

Today the product keeps these from DALI (`refuse_unparsable`). They stand for whatever images may yet kill it. Processes
are patched by a `sitecustomize` on their path, so that the product has no door for tests.
"""

from pathlib import Path

from test_broken import WHOLE

# Of the size that the index has, so that it is DALI's to refuse.
KILLER = bytes(200) + WHOLE[200:]
# DALI's own end is by chance: it dies in some tries, and raises in the others.
BY_CHANCE = ""
# Where DALI raises, the process ends as if it had died; and so in every try.
ALWAYS = "decoder._salvage = lambda self, request, encoded: os.kill(os.getpid(), signal.SIGSEGV)"
# It never ends, without a try of DALI's.
HANGS = """decode, bad = decoder._survive, lambda encoded: any(one and not any(one[:9]) for one in encoded)
    decoder._survive = lambda self, ahead, like: decode(
        self, (time.sleep(600) if bad(pair[1]) else pair for pair in ahead), like
    )"""
# Whatever it decodes: the machine is at fault.
ANY_BATCH = "decoder.pixels = lambda self, encoded: os.kill(os.getpid(), signal.SIGSEGV)"

SITE = """
import importlib.abc, importlib.machinery, os, signal, sys, time

def of_fetch(module):
    module.refuse_unparsable = lambda encoded: None

def of_dali(module):
    decoder = module.Decoder
    {end}

PATCHES = {{"pipeline.data.fetch": of_fetch, "pipeline.data.dali": of_dali}}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def write_site(folder: Path, end: str) -> Path:
    """A folder for PYTHONPATH."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE.format(end=end or "pass"))
    return folder
