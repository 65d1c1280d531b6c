"""YAML files that people write: settings and plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from untrigger.errors import InputError


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's ``name: value`` lines, read as plain data: no tag of YAML's makes an object.

    Raises:
        InputError: it cannot be read, is not YAML, or holds something else.
    """
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML file that can be read") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        what = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error).splitlines()[0]
        raise InputError(f"{path}: is not YAML: {what}; write lines of 'name: value'") from error
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply; write lines of 'name: value'") from error
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told):
        raise InputError(f"{path}: must hold lines of 'name: value'")
    return told
