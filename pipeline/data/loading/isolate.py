"""Finding the images that kill the process that decodes them, in a process of its own.

What DALI's parser refuses never reaches DALI (`fetch`). Whatever else ends its process, or has it hang, is found here:
batches are decoded one at a time in a child. Where it dies, a new child decodes parts of that batch, with stand-ins in
place of the other images, so that the batch stays as large as it was: DALI's crashes depend on that.

They depend on chance, too. DALI 2.4 dies of a damaged header in about 7 of 10 tries at batches of 64, and raises in the
others. So each part is tried several times, and an image that DALI refuses, in a batch that killed, is its killer.
"""

import contextlib
import ctypes
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import BatchSpec
from pipeline.data.index import Index, load_index
from pipeline.data.loading.bad_images import BadImages, max_bad_images
from pipeline.data.loading.child import Child, parent_connection
from pipeline.data.loading.dali import DaliPipeline
from pipeline.data.loading.fetch import BatchReader
from pipeline.data.loading.loader import LoaderContext

START_S = 120.0  # for the imports, on a busy machine
DECODE_S = 60.0  # for one batch that is in memory; what takes longer hangs
POLL_S = 2.0
NUM_PARTS = 8  # of a batch, in each round: 512 images are three rounds, and a round is a process of seconds
NUM_TRIES = 3  # of each part, as a crash may depend on chance
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
Trial = tuple[BatchSpec, frozenset[int]]  # what to decode, and the rows that stand-ins take the place of


class CannotTellError(RuntimeError):
    """A child ended by something that is no fault of an image."""


@dataclass
class _Outcome:
    """What a child came to: trials that it survived, rows that DALI refused and why, and what it died of."""

    num_done: int = 0
    refused: dict[int, str] = field(default_factory=dict)
    death: str | None = None


@dataclass(frozen=True)
class Isolation:
    """Decodes in children what may kill them.

    index: opened from path. context: the rank's own. max_batch: most images in a batch, as the rank's loader has it.
    warn: told what cannot be found out. heartbeat: called while a child is waited for.
    """

    path: Path
    index: Index
    cfg: DataConfig
    context: LoaderContext
    max_batch: int
    warn: Callable[[str], None]
    heartbeat: Callable[[], None] = lambda: None

    def search(
        self, specs: Sequence[BatchSpec], known: Sequence[int], record: Callable[[int, str], None], until: float
    ) -> None:
        """Find the rows that kill the process that decodes these batches, or that DALI refuses.

        Args:
            known: rows to leave out. More than `max_bad_fraction` of the index are not looked for.
            record: called with each row that is found and the reason, at once.
            until: of the monotonic clock; what is found until then has to do.
        """
        avoided = set(known)
        max_bad = max_bad_images(self.cfg.max_bad_fraction, len(self.index))

        def add(rows: dict[int, str]) -> None:
            for row, reason in rows.items():
                avoided.add(row)
                record(row, reason)

        try:
            while specs and len(avoided) <= max_bad:
                if time.monotonic() > until:
                    self.warn(f"{len(specs)} batches are left where images may kill the process that decodes them")
                    return
                outcome = self._try([(spec, frozenset(avoided)) for spec in specs])
                add(outcome.refused)
                if outcome.death is None:
                    return
                specs = specs[outcome.num_done :]
                if outcome.refused:  # it may be for these, and not for the images of its last batch, that it died
                    continue
                crashing = self._crashing(specs[0], frozenset(avoided))
                add(dict.fromkeys(crashing, f"it kills the process that decodes it ({outcome.death})"))
                if not crashing:
                    self.warn(
                        f"decoding {len(specs[0])} images ended a process ({outcome.death}), and none of them alone "
                        f"does so again: rows of the index {' '.join(map(str, specs[0].rows))}"
                    )
                    specs = specs[1:]
        except CannotTellError as e:
            self.warn(f"whether an image kills the process that decodes it cannot be found out: {e}")

    def _crashing(self, spec: BatchSpec, avoided: frozenset[int]) -> set[int]:
        """The rows of a batch that killed a child; none where they do not do it again."""
        everything = frozenset(spec.rows.tolist()) | avoided
        suspects = sorted(everything - avoided)
        while suspects:
            parts = [part.tolist() for part in np.array_split(suspects, min(NUM_PARTS, len(suspects)))]
            # First none of the images: what dies of that dies of the machine.
            trials = [(spec, everything), *((spec, everything - set(part)) for part in parts * NUM_TRIES)]
            outcome = self._try(trials)
            if outcome.refused:
                return set(outcome.refused)
            if outcome.death is None:
                return set()
            if outcome.num_done == 0:
                raise CannotTellError(f"a process that decoded none of them ended, too ({outcome.death})")
            suspects = parts[(outcome.num_done - 1) % len(parts)]
            if len(suspects) == 1:
                return set(suspects)
        return set()

    def _try(self, trials: Sequence[Trial]) -> _Outcome:
        """Have a child decode one trial after the other.

        Raises:
            CannotTellError: it did not start, or could not read the images.
        """
        child = Child("pipeline.data.loading.isolate")
        try:
            return self._watch(child, trials)
        finally:
            child.kill()

    def _watch(self, child: Child, trials: Sequence[Trial]) -> _Outcome:
        outcome, connection = _Outcome(), child.connection
        try:
            if not self._wait_for_answer(connection, START_S):
                raise CannotTellError("a process for it does not start")
            connection.recv()
            connection.send((self.path, self.cfg, self.context, self.max_batch, trials))
        except (EOFError, OSError) as e:
            raise CannotTellError(f"a process for it ended before it began ({child.describe_end()})") from e
        try:
            for _ in trials:
                if not self._wait_for_answer(connection, self.context.retry_timeout_s + DECODE_S):
                    raise CannotTellError("the images' storage does not answer")
                if (error := connection.recv()) is not None:
                    raise CannotTellError(error)
                if not self._wait_for_answer(connection, DECODE_S):
                    outcome.death = f"no end after {DECODE_S:.0f} s"
                    return outcome
                if isinstance(refused := connection.recv(), str):
                    raise CannotTellError(refused)
                outcome.refused |= refused
                outcome.num_done += 1
        except (EOFError, OSError):
            outcome.death = child.describe_end()
        return outcome

    def _wait_for_answer(self, connection: Connection, seconds: float) -> bool:
        """Whether it does within so long."""
        deadline = time.monotonic() + seconds
        self.heartbeat()  # also where a child is quick
        while not (answers := connection.poll(POLL_S)) and time.monotonic() < deadline:
            self.heartbeat()
        return answers


def _decode(
    path: Path,
    cfg: DataConfig,
    context: LoaderContext,
    max_batch: int,
    trials: Sequence[Trial],
    send: Callable[[Any], None],
) -> None:
    """The child's work: after each reading, send what went wrong, or None; after each decoding, what DALI refused or
    what is wrong with the device."""
    index = load_index(path)
    for spec, avoided in trials:
        refused = dict[str, str]()
        bad_images = BadImages(index, cfg.max_bad_fraction, refused.__setitem__)
        reader = BatchReader(index, cfg, lambda _: None, context.retry_timeout_s)
        reader.known |= dict.fromkeys(avoided, "")
        pipeline = DaliPipeline(cfg, max_batch, context.num_threads, context.device, bad_images, list(spec.draws))
        with closing(reader), closing(pipeline):
            try:
                batch = reader.read(spec, lambda size: memoryview(bytearray(size)))
            except OSError as e:
                send(str(e))
                return
            send(None)
            try:
                list(pipeline.decode(iter([batch])))
                if context.device.type == "cuda":
                    torch.cuda.synchronize(context.device)
            except RuntimeError as e:  # of the device: it says nothing of the images
                send(str(e))
                return
            rows = {index.full_path(row): row for row in spec.rows.tolist()}
            send({rows[image]: reason for image, reason in refused.items()})


def main() -> None:
    """The child: it ends with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    torch.set_num_threads(1)
    with parent_connection() as parent, contextlib.suppress(EOFError, BrokenPipeError):
        parent.send("ready")
        path, cfg, context, max_batch, trials = parent.recv()
        # As many as there are: whether they are too many is for the loaders to say.
        cfg = dataclasses.replace(cfg, max_bad_fraction=1.0)
        _decode(path, cfg, context, max_batch, trials, parent.send)


if __name__ == "__main__":
    main()
