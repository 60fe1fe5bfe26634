"""What stops a long run from outside, said in one sentence: no disk, no memory."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anybits.errors import AnybitsError

RESUME = "finished blocks stay, and the same command resumes"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a full disk and exhausted memory into AnybitsError; remove half-written files from `folder`.

    Ctrl-C passes: what is on disk is resumable at every moment.
    """
    try:
        yield
    except MemoryError:
        raise AnybitsError(f"out of memory: fewer --samples or a smaller --seq-len need less; {RESUME}") from None
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise AnybitsError(f"out of memory: fewer --samples or a smaller --seq-len need less; {RESUME}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _sweep(folder)
        free = shutil.disk_usage(folder).free
        raise AnybitsError(f"no space left in {folder} ({free / 1e9:.2f} GB free): make room; {RESUME}") from None


def _sweep(folder: Path) -> None:
    for partial in folder.rglob("*.partial"):
        partial.unlink(missing_ok=True)
