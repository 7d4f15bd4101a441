"""When this command began: the first thing that the command line imports, so that its own imports count.

Not the process's start time, which survives `exec`: a script that installs, then `exec`s, would count its installation.
"""

import time

BEGAN = time.time()  # Unix time
