"""Refuse versions of transformers in which something would go wrong without an error."""

from __future__ import annotations

import transformers
from packaging.version import Version

from untrigger.errors import InputError

OWN_LABELS = "5.16"  # before, processors do not give the places of image tokens, and labels stand beside the answers
IN_HOST = "5.6"  # a host makes the labels itself; older versions were never run


def require_transformers(oldest: str, what: str) -> None:
    """Check that the installed transformers is ``oldest`` or newer; ``what`` needs it.

    Raises:
        InputError: it is older.
    """
    if Version(transformers.__version__) < Version(oldest):
        raise InputError(
            f"{what}: needs transformers {oldest} or newer, and {transformers.__version__} is installed; run "
            f"`pip install 'transformers>={oldest}'`, or use an environment of its own"
        )
