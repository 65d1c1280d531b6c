"""``python -m untrigger``, also under ``torchrun``."""

from untrigger.cli import main

main()
