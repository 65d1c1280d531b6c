"""``python -m untrigger``, also under ``torchrun``."""

from untrigger.cli.main import main

main()
