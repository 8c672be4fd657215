"""An exported folder on the Hugging Face Hub (`opd export --push`): asked before the export starts, uploaded after it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from storage.disk.redact import redact
from storage.errors import InputError, OpdError

MESSAGE = "{what}, weights sha256 {sha}"
"""Of the commit."""


class Destination:
    """A model repository of the Hub. Creating one asks the Hub who the token belongs to, and with `private` whether the
    repository is public; nothing is written.

    InputError for a name that the Hub does not take, without a token, with one that it refuses, where it does not answer, and
    with `private` for a public repository: the Hub would ignore the wish and show the upload to everyone."""

    def __init__(self, repo: str, private: bool) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

        self.repo, self._private = repo, private
        try:
            validate_repo_id(repo)
            if repo.count("/") != 1:
                raise HFValidationError("an owner and a name are needed")
        except HFValidationError as error:
            raise InputError(f"--push {repo!r}: not a repository's name ({error}); write OWNER/NAME") from error
        if get_token() is None:
            raise InputError(f"--push {repo}: no token of the Hub; set HF_TOKEN, or call hf auth login")
        self._api: Any = HfApi()
        public = False
        try:
            self._api.whoami()
            if private:
                with suppress(RepositoryNotFoundError):
                    public = not self._api.model_info(repo).private
        except Exception as error:  # of the network, of the Hub, of its offline mode
            raise InputError(
                f"--push {repo}: {self._api.endpoint} does not take the token, or does not answer"
                f" ({_line(error)}); nothing was exported"
            ) from error
        if public:
            raise InputError(
                f"--private: {repo} exists and is public; make it private with: hf repos settings {repo} --private, or leave out"
                " --private; nothing was exported"
            )

    def upload(self, folder: Path, what: str, sha: str) -> str:
        """Commits the folder's files to the repository, which is created where it is missing; files of the same names get a new
        version. Returns its address. OpdError where that fails; the folder stays."""
        try:
            self._api.create_repo(self.repo, private=self._private, exist_ok=True)
            self._api.upload_folder(
                repo_id=self.repo, folder_path=folder, commit_message=MESSAGE.format(what=what, sha=sha[:16])
            )
        except Exception as error:
            raise OpdError(
                f"--push {self.repo}: {_line(error)}; {folder} is complete, upload it later with:"
                f" hf upload {self.repo} {folder}"
            ) from error
        return f"{self._api.endpoint}/{self.repo}"


def _line(error: Exception) -> str:
    return redact(" ".join(str(error).split())) or type(error).__name__
