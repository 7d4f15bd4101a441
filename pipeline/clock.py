"""When this command began, and what goes on beside it since: the first thing that the command line imports.

Not the process's start time, which survives `exec`: a script that installs, then `exec`s, would count its installation.
"""

import time

BEGAN = time.time()  # Unix time

from pipeline.machine import OtherLoad  # noqa: E402  after the time was taken

OTHER_LOAD = OtherLoad()
