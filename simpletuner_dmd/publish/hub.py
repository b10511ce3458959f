"""Uploads to the Hugging Face Hub, in the background. They never end or hold up a run; the files are on disk first.

What waits for upload is listed in `hub-queue.json` in the output folder before anything is sent, and taken off it when
the Hub has it. A run that was killed, or whose Hub was away, goes on from that list: the same command does so, and
`simpletuner push`. The library itself skips files that the Hub has already, and makes one commit of a whole folder, so
a repository never shows half of one.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpletuner_dmd.durable import write_json, write_text
from simpletuner_dmd.publish.background import BackgroundWorker

log = logging.getLogger(__name__)

QUEUE = "hub-queue.json"
WAITS = (2.0, 8.0, 30.0, 120.0, 300.0)
"""Seconds before each further attempt where the Hub, or the way to it, fails."""
ASKING_SECONDS = 20.0  # for the questions at the start of a run
NOT_UPLOADED = [".*", "**/.*"]


def push_command(output_dir: Path | str) -> str:
    """The command that uploads a run's export by hand, later."""
    return f"simpletuner push {shlex.quote(str(output_dir))}"


def is_offline() -> bool:
    """Whether the user told Hugging Face's libraries to stay off the network."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
               for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))  # fmt: skip


# --- access -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Access:
    """Whether uploads can work. repo_id: with its owner, where that is known. problem: why not, or why it is not known;
    usable: False where trying would be in vain."""

    repo_id: str
    usable: bool
    problem: str = ""


def check_access(
    repo_id: str, *, private: bool = True, token: str | None = None, endpoint: str | None = None
) -> Access:
    """Asks the Hub who the token belongs to, makes the repository, and asks whether the token may write to it.

    Four small requests, before any training. An existing repository keeps its visibility. Never raises for what the
    Hub, the network or the token do.
    """
    if is_offline():
        return Access(repo_id, False, "the Hub is switched off (HF_HUB_OFFLINE)")
    from huggingface_hub import HfApi, get_token

    if not (token or get_token()):
        return Access(repo_id, False, "there is no Hugging Face token (run: hf auth login)")
    api = HfApi(token=token, endpoint=endpoint)
    return _within(ASKING_SECONDS, lambda: _ask(api, repo_id, private)) or Access(
        repo_id, True, f"the Hub did not answer in {ASKING_SECONDS:.0f} s; uploads are tried nevertheless"
    )


def _ask(api: Any, repo_id: str, private: bool) -> Access:
    try:
        who = api.whoami()
    except Exception as error:  # noqa: BLE001 - the outermost edge of an optional service
        if status_of(error) in (401, 403):
            return Access(repo_id, False, "the Hugging Face token is not valid (run: hf auth login)")
        return Access(repo_id, True, f"the Hub could not be asked ({_reason(error)}); uploads are tried nevertheless")
    full = repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        return Access(full, False, "the Hugging Face token can only read: make one that can write, at "
                      "https://huggingface.co/settings/tokens")  # fmt: skip
    try:
        api.create_repo(full, private=private, exist_ok=True)
        api.auth_check(full, write=True)  # creating does not tell: it is content with a repository that is there
        public = private and not api.model_info(full).private
    except Exception as error:  # noqa: BLE001 - the outermost edge of an optional service
        if status_of(error) in (401, 403):
            return Access(full, False, f"the Hugging Face token of {who['name']} may not write to {full}")
        return Access(full, not _final(error), f"{full} could not be made ready ({_reason(error)})")
    return Access(full, True, f"{full} is there already and public; model_card_private acts on new ones" if public
                  else "")  # fmt: skip


def _within(seconds: float, ask: Callable[[], Access]) -> Access | None:
    """The answer, or None where it takes longer: a Hub that hangs must not hold up the start."""
    answers: list[Access] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), name="hub access", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


# --- uploads ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upload:
    """One folder on its way. folder: within the output folder, or absolute. path_in_repo: "" is the top. temporary: the
    folder goes when the Hub has it."""

    folder: str
    path_in_repo: str = ""
    message: str = "Upload export"
    temporary: bool = False


class Queue:
    """What waits for upload, in a file of its own: whole or absent, and there before anything is sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def waiting(self) -> list[Upload]:
        """In order. A folder that is not there any more is left out; a file of another program is none."""
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
            found = [Upload(**entry) for entry in entries]
        except (OSError, ValueError, TypeError):
            return []
        return [upload for upload in found if self.folder_of(upload).is_dir()]

    def folder_of(self, upload: Upload) -> Path:
        return self.path.parent / upload.folder

    def enlist(self, folder: Path, path_in_repo: str, message: str, *, temporary: bool) -> Upload:
        """Adds a folder; an output folder that is moved keeps its list, so one within it is named from there."""
        folder, home = folder.resolve(), self.path.parent.resolve()
        name = folder.relative_to(home) if folder.is_relative_to(home) else folder
        upload = Upload(str(name), path_in_repo, message, temporary)
        self.add(upload)
        return upload

    def add(self, upload: Upload) -> None:
        """At the end; an earlier one to the same place is replaced: the folder holds the newer files."""
        with self._lock:
            others = [other for other in self.waiting() if other.path_in_repo != upload.path_in_repo]
            self._write([*others, upload])

    def remove(self, upload: Upload) -> None:
        with self._lock:
            self._write([other for other in self.waiting() if other != upload])

    def _write(self, uploads: Sequence[Upload]) -> None:
        if uploads:
            write_json(self.path, [asdict(upload) for upload in uploads])
        else:
            self.path.unlink(missing_ok=True)


class HubUploader:
    """Uploads folders to one repository, in order, from a background thread.

    output_dir: of the run; what is not uploaded stays listed there. failures: one sentence per upload that was given
    up; the same sentence goes to the log as a warning. waits: seconds before each further attempt. endpoint: for a
    private Hub or a test; the library's own default otherwise.
    """

    def __init__(
        self, repo_id: str, output_dir: Path, *, private: bool = True, token: str | None = None,
        endpoint: str | None = None, waits: Sequence[float] = WAITS,
    ) -> None:  # fmt: skip
        self.repo_id, self.output_dir = repo_id, output_dir
        self.failures: list[str] = []
        self.uploaded: list[Path] = []
        self.queue = Queue(output_dir / QUEUE)
        self._private, self._token, self._endpoint, self._waits = private, token, endpoint, waits
        self._worker = BackgroundWorker("hub upload")
        self._ending = threading.Event()

    def resume(self, besides: Sequence[str] = ()) -> int:
        """Queues what an earlier run left, but for these places in the repository; returns how much that is."""
        waiting = [upload for upload in self.queue.waiting() if upload.path_in_repo not in besides]
        for upload in waiting:
            self._submit(upload)
        return len(waiting)

    def upload(self, folder: Path, *, path_in_repo: str = "", message: str = "Upload export",
               temporary: bool = False) -> None:  # fmt: skip
        """Lists `folder` for upload, durably, and returns at once."""
        self._submit(self.queue.enlist(folder, path_in_repo, message, temporary=temporary))

    def close(self, timeout: float = 600.0, *, patient: bool = False) -> bool:
        """Waits for the listed uploads at the end of a run, `timeout` seconds at most. True if all of them were tried.

        patient: failures are still followed by waits and further attempts; else the next one is the last.
        """
        if not patient:
            self._ending.set()
        done = self._worker.close(timeout)
        if not done:
            log.warning("The upload to %s did not finish in %.0f s; it goes on with: %s", self.repo_id, timeout,
                        push_command(self.output_dir))  # fmt: skip
        return done

    def _submit(self, upload: Upload) -> None:
        if not self._worker.submit(lambda: self._run(upload)):
            self._failed(upload, "too many uploads are waiting")

    def _run(self, upload: Upload) -> None:
        if upload not in self.queue.waiting():
            return  # a newer one to the same place has taken its turn
        for attempt in range(len(self._waits) + 1):
            try:
                self._send(upload)
            except Exception as error:  # noqa: BLE001 - the outermost edge of an optional service
                last = attempt == len(self._waits) or _final(error) or self._ending.is_set()
                if last:
                    self._failed(upload, _reason(error))
                    return
                log.info("The upload to %s is tried again in %.0f s (%s)", self.repo_id, self._waits[attempt],
                         _reason(error))  # fmt: skip
                self._ending.wait(self._waits[attempt])
            else:
                self._done(upload)
                return

    def _send(self, upload: Upload) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils import logging as library

        disable_progress_bars()
        library.set_verbosity_error()  # its warnings hold addresses with signatures
        api = HfApi(token=self._token, endpoint=self._endpoint)
        api.create_repo(self.repo_id, private=self._private, exist_ok=True)
        api.upload_folder(
            repo_id=self.repo_id,
            folder_path=self.queue.folder_of(upload),
            path_in_repo=upload.path_in_repo or None,
            commit_message=upload.message,
            ignore_patterns=NOT_UPLOADED,
        )

    def _done(self, upload: Upload) -> None:
        folder = self.queue.folder_of(upload)
        self.queue.remove(upload)
        self.uploaded.append(folder)
        log.info("Uploaded %s to %s", folder, self.repo_id)
        if upload.temporary:
            shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, upload: Upload, reason: str) -> None:
        sentence = (f"{self.queue.folder_of(upload)} was not uploaded to {self.repo_id}: {reason}. "
                    f"Push it later with: {push_command(self.output_dir)}")  # fmt: skip
        self.failures.append(sentence)
        log.warning(sentence)


def status_of(error: Exception) -> int | None:
    """The HTTP status behind an error of the library; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _final(error: Exception) -> bool:
    """Whether the same request would fail again: the Hub answered, and it is not busy or ill."""
    status = status_of(error)
    if status is None:
        return isinstance(error, ValueError)  # a name that is none, a folder that is not there
    return 400 <= status < 500 and status not in (408, 409, 412, 429)


def _reason(error: Exception) -> str:
    """The first line of the error: the rest is request ids and, for some errors, addresses with signatures."""
    lines = str(error).strip().splitlines()
    text = lines[0].split("https://")[0].split("http://")[0].rstrip(".:( ") if lines else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def point_at_hub(export_dir: Path, repo_id: str) -> None:
    """Lets the code on the card of an export that was made without a repository read it from there.

    A student that brings files besides diffusers' own is opened from a folder; its card stays as it is.
    """
    document = json.loads((export_dir / "distill.json").read_text(encoding="utf-8"))
    before = document["snippet"]
    if any(word in before for word in ("lycoris", "sys.path")):
        return
    after = before.replace('source = "path/to/export"', f"source = {json.dumps(repo_id)}")
    card = export_dir / "README.md"
    if after != before and card.is_file():
        write_text(card, card.read_text(encoding="utf-8").replace(before, after))
        write_json(export_dir / "distill.json", document | {"snippet": after})
