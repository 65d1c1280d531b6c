"""``push_to_hub``: the finished folder goes to the hub once; the hub is tried before anything is trained."""

from __future__ import annotations

import copy
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from untrigger.errors import InputError

_PATIENCE = 10.0  # seconds in which the hub must answer before the training
_DEFAULTS = {
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_strategy": HubStrategy.EVERY_SAVE,
    "hub_token": None,
    "hub_private_repo": None,
    "hub_always_push": False,
    "hub_revision": None,
}
# checkpoints, stages, logs, temporary files, and pickles, which nobody should load
_STAYS_HERE = ["checkpoint-*", "stages/*", "runs/*", ".*", "_*", "*.bin", "*.pt", "*.pth", "*.pkl"]


def without_hub(args: TrainingArguments) -> TrainingArguments:
    """A copy of the host's arguments with which the host pushes nothing, and which equals that of a run without."""
    own = copy.copy(args)
    for name, value in _DEFAULTS.items():
        setattr(own, name, value)
    return own


def check_hub(args: TrainingArguments) -> None:
    """If a push is wanted, check within seconds that the hub answers and knows the user.

    Raises:
        InputError: there is no token, the hub refuses it, or it is out of reach.
    """
    if not args.push_to_hub:
        return
    token = args.hub_token or get_token()
    if token is None:
        raise InputError("push_to_hub: there is no token for the hub; run `hf auth login`, or give hub_token")
    address = f"{constants.ENDPOINT}/api/whoami-v2"
    try:
        hf_raise_for_status(get_session().get(address, headers=build_hf_headers(token=token), timeout=_PATIENCE))
    except HfHubHTTPError as error:
        raise InputError(f"push_to_hub: the hub refuses the token ({_why(error)}); run `hf auth login`") from error
    except Exception as error:  # those of the client's HTTP library, which differs between its versions
        raise InputError(
            f"push_to_hub: {constants.ENDPOINT} is out of reach ({_why(error)}); leave out push_to_hub, and push the "
            "folder later with `hf upload`"
        ) from error


def open_repository(args: TrainingArguments) -> str:
    """The id of the repository to push to, which is created if it is missing.

    Raises:
        InputError: the user may not write there.
    """
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    try:
        return HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # as above
        raise InputError(f"push_to_hub: cannot create or open {name} ({_why(error)}); set hub_model_id") from error


def push(args: TrainingArguments) -> None:
    """Push the finished output folder in one commit.

    Raises:
        InputError: it cannot be pushed; the folder is complete.
    """
    folder, repository = Path(str(args.output_dir)), open_repository(args)
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Fine-tuned with untrigger",
            revision=args.hub_revision,
            ignore_patterns=_STAYS_HERE,
        )
    except Exception as error:  # as above
        raise InputError(
            f"{folder}: is finished, but was not pushed to {repository} ({_why(error)}); run the command again with "
            "--resume (resume=True)"
        ) from error


def _why(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
