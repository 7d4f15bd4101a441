"""Images with a damaged header that reach DALI, and what then becomes of the process.

Today the product keeps these from DALI (`refuse_unparsable`). They stand for whatever images may yet kill it.
"""

from pathlib import Path

import patching
from odd_images import encode, picture

# Of the size that the index has, so that it is DALI's to refuse.
KILLER = bytes(200) + encode(picture(48, 64), "JPEG", quality=85)[200:]
# DALI's own end is by chance: it dies in some tries, and raises in the others.
BY_CHANCE = ""
# Where DALI raises, the process ends as if it had died; and so in every try.
ALWAYS = "module.DaliPipeline._salvage = lambda self, batch: os.kill(os.getpid(), signal.SIGSEGV)"
# It never ends, without a try of DALI's.
HANGS = """
    decode, bad = module.DaliPipeline._decode, lambda batch: any(not one[:9].any() for one in batch.images)
    module.DaliPipeline._decode = lambda self, batches: decode(
        self, (time.sleep(600) if bad(batch) else batch for batch in batches)
    )
"""
# Whatever it decodes: the machine is at fault.
ANY_BATCH = "module.DaliPipeline.decode = lambda self, batches: os.kill(os.getpid(), signal.SIGSEGV)"


def write_site(folder: Path, end: str) -> Path:
    """A folder for PYTHONPATH."""
    let_through = "module.refuse_unparsable = lambda encoded: None"
    return patching.write_site(folder, {"pipeline.data.loading.fetch": let_through, "pipeline.data.loading.dali": end})
