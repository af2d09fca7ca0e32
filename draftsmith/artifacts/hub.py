"""Downloads artifacts from the Hugging Face hub and pushes them to it, with huggingface_hub.

Tested against a local server that answers like the hub, not against the hub itself.
"""

import os
from pathlib import Path
from typing import Any


def check_allowed(problem: str) -> None:
    """Raises ValueError with a message that begins with `problem` if access to the hub is disabled."""
    if os.environ.get("DRAFTSMITH_OFFLINE") == "1":
        raise ValueError(f"{problem}; DRAFTSMITH_OFFLINE=1 disables access to the hub")


def download(name: str) -> Path:
    """Returns the folder of a local copy of the repository `name` (owner/name); raises ValueError if that fails."""
    check_allowed(f"artifact {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:  # the exception classes differ between versions of huggingface_hub
        raise ValueError(
            f"artifact {name}: no such folder, and the download from the hub failed: {_first_line(error)}"
        ) from error


def check_may_push(folder: Path) -> None:
    """Raises ValueError if access to the hub is disabled or there is no token."""
    check_allowed(f"{folder} cannot be pushed")
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(
            f"{folder} cannot be pushed without a token: run `hf auth login`, or set HF_TOKEN to a write token"
        )


def push(folder: Path, files: dict[str, str | Path], name: str, *, private: bool) -> str:
    """Uploads `files` (path in the repository: local path, or text) in one commit; returns the repository's URL.

    `folder` is named in errors. Raises ValueError if access to the hub is disabled or the hub rejects the push; nothing
    is committed then. `HfApi.upload_folder` would need a second commit for the README.md, which names the repository.
    """
    check_may_push(folder)
    from huggingface_hub import CommitOperationAdd, HfApi

    api: Any = HfApi(library_name="draftsmith")
    operations = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=file.encode() if isinstance(file, str) else file)
        for path, file in files.items()
    ]
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, operations, commit_message="Upload a drafter made by draftsmith")
    except Exception as error:  # the exception classes differ between versions of huggingface_hub
        raise ValueError(f"{folder} could not be pushed to {name}: {_first_line(error)}") from error
    return str(url)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
