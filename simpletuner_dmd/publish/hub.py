"""Upload to the Hugging Face Hub in the background. It never ends or holds up a run; `export/` is there first."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path

from simpletuner_dmd.publish.background import BackgroundWorker

log = logging.getLogger(__name__)


def push_command(repo_id: str, folder: Path | str) -> str:
    """The command that uploads the folder by hand, later."""
    return f"hf upload {shlex.quote(repo_id)} {shlex.quote(str(folder))}"


def is_offline() -> bool:
    """Whether the user told Hugging Face's libraries to stay off the network."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
               for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))  # fmt: skip


def check_access(repo_id: str | None, folder: Path | str) -> str | None:
    """A warning to give at start when an upload at the end cannot work; None when nothing speaks against it.

    Reads files and the environment only; no request is made.
    """
    if not repo_id:
        return "push_to_hub is on but hub_model_id is not set: the result stays on this machine"
    later = f"The result stays in {folder}; push it later with: {push_command(repo_id, folder)}"
    if is_offline():
        return f"push_to_hub is on but the Hub is switched off (HF_HUB_OFFLINE). {later}"
    from huggingface_hub import get_token

    if not get_token():
        return f"push_to_hub is on but there is no Hugging Face token (run: hf auth login). {later}"
    return None


class HubUploader:
    """Uploads folders to one repository, in order, from a background thread.

    failures: one sentence per upload that failed; the same sentence goes to the log as a warning.
    endpoint: for a private Hub or a test; the library's own default otherwise.
    """

    def __init__(
        self, repo_id: str, *, private: bool = True, token: str | None = None, endpoint: str | None = None
    ) -> None:
        self.repo_id = repo_id
        self.failures: list[str] = []
        self.uploaded: list[Path] = []
        self._private = private
        self._token = token
        self._endpoint = endpoint
        self._worker = BackgroundWorker("hub upload")

    def upload(self, folder: Path, *, path_in_repo: str | None = None, message: str = "Upload export") -> None:
        """Queues `folder` for upload and returns at once."""
        if is_offline():
            self._failed(folder, "the Hub is switched off (HF_HUB_OFFLINE)")
        elif not self._worker.submit(lambda: self._upload(folder, path_in_repo, message)):
            self._failed(folder, "too many uploads are waiting")

    def close(self, timeout: float = 600.0) -> bool:
        """Waits for the queued uploads at the end of a run, `timeout` seconds at most."""
        done = self._worker.close(timeout)
        if not done:
            log.warning("The upload to %s did not finish in %.0f s; `hf upload` goes on where it stopped",
                        self.repo_id, timeout)  # fmt: skip
        return done

    def _upload(self, folder: Path, path_in_repo: str | None, message: str) -> None:
        try:
            from huggingface_hub import HfApi

            api = HfApi(token=self._token, endpoint=self._endpoint)
            api.create_repo(self.repo_id, private=self._private, exist_ok=True)
            api.upload_folder(repo_id=self.repo_id, folder_path=folder, path_in_repo=path_in_repo,
                              commit_message=message, ignore_patterns=[".*", "**/.*"])  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the outermost edge of an optional service
            self._failed(folder, _reason(error))
        else:
            self.uploaded.append(folder)
            log.info("Uploaded %s to %s", folder, self.repo_id)

    def _failed(self, folder: Path, reason: str) -> None:
        sentence = (f"{folder} was not uploaded to {self.repo_id}: {reason}. "
                    f"Push it later with: {push_command(self.repo_id, folder)}")  # fmt: skip
        self.failures.append(sentence)
        log.warning(sentence)


def _reason(error: Exception) -> str:
    """The first line of the error: the rest is request ids and, for some errors, addresses with signatures."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:200]}" if lines else type(error).__name__
