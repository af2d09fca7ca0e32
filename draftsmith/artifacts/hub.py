"""Artifacts on the Hugging Face hub, through huggingface_hub, which comes with transformers.

No hub could be reached where this was written: it is tested against one that answers requests in the same process.
"""

import os
from pathlib import Path
from typing import Any


def check_allowed(what: str) -> None:
    """Raises ValueError, a sentence that begins with `what`, if the hub must not be asked."""
    if os.environ.get("DRAFTSMITH_OFFLINE") == "1":
        raise ValueError(f"{what}; DRAFTSMITH_OFFLINE=1 forbids asking the hub")


def download(name: str) -> Path:
    """Returns a local copy of the repository `name` (owner/name); raises ValueError if there is none to be had."""
    check_allowed(f"artifact {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:  # which library's errors come through depends on its version
        raise ValueError(f"artifact {name}: no such folder, and none from the hub: {_first_line(error)}") from error


def check_may_push(folder: Path) -> None:
    """Raises ValueError if the hub must not be asked, or there is no token."""
    check_allowed(f"{folder} cannot be pushed")
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(
            f"{folder} cannot be pushed without a token: run `hf auth login`, or set HF_TOKEN to one that may write"
        )


def push(folder: Path, files: dict[str, str | Path], name: str, *, private: bool) -> str:
    """Uploads `files` (name there: path here, or text) in one commit, and returns the repository's address.

    `folder` is named in errors. Raises ValueError if the hub may not be asked, or refuses; no files are then there.
    """
    check_may_push(folder)
    from huggingface_hub import CommitOperationAdd, HfApi

    api: Any = HfApi(library_name="draftsmith")
    contents = {there: here.encode() if isinstance(here, str) else str(here) for there, here in files.items()}
    added = [CommitOperationAdd(path_in_repo=there, path_or_fileobj=content) for there, content in contents.items()]
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, added, commit_message="A drafter made by draftsmith")
    except Exception as error:  # which library's errors come through depends on its version
        raise ValueError(f"{folder} could not be pushed to {name}: {_first_line(error)}") from error
    return str(address)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
