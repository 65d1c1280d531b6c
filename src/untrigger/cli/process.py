"""How a process of the command line is set up, before any model library is loaded."""

from __future__ import annotations

import os
import warnings

# Rounds that an idle thread of libgomp spins before it sleeps. By default it spins for long, and beside other work it
# takes the core that the rest waits for: docs/log.md has the times of a step for several values.
_SPIN_COUNT = "1000"


def prepare_process() -> None:
    """Let idle threads sleep soon, unless the user's environment says otherwise, and silence the hosts' own warnings.

    libgomp reads its environment when torch is loaded, so this comes first.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    # the model libraries warn about their own renamed properties, which the user cannot fix
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
