"""One POST per event to a Discord or plain JSON endpoint. A failure is a warning; a run never waits for it.

The config file is SimpleTuner's: {"webhook_type": "discord", "webhook_url": …} or {"webhook_type": "raw",
"callback_url": …}, optionally "message_prefix", "auth_token" (sent as X-API-Key), "log_level" (info; error: only what
went wrong) and "ssl_no_verify"; or a list of such objects.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner_dmd.publish.background import BackgroundWorker

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
WAITS = (1.0, 5.0, 15.0)
"""Seconds before each further attempt where the endpoint is away, ill or busy; a busy one may name its own."""
LONGEST_WAIT = 60.0
DISCORD_LIMIT = 2000
LEVELS = ("debug", "info", "warning", "error", "critical")
_KEYS = {"webhook_type", "webhook_url", "callback_url", "message_prefix", "auth_token", "log_level", "ssl_no_verify"}
# Values of these are taken out of every message.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class Endpoint:
    url: str
    kind: str  # "discord" | "raw"
    prefix: str
    auth_token: str = ""
    level: str = "info"
    verify: bool = True  # the certificate of an https address

    @property
    def host(self) -> str:
        """What may be named in a log: the path of a webhook address is its password."""
        return urllib.parse.urlsplit(self.url).hostname or "?"


class Webhook:
    """Sends events to the endpoints, each from a background thread of its own. Without endpoints it does nothing.

    waits: seconds before each further attempt.
    """

    def __init__(
        self, endpoints: list[Endpoint], timeout: float = TIMEOUT_SECONDS, waits: Sequence[float] = WAITS
    ) -> None:
        self.endpoints = endpoints
        self.failures: list[str] = []
        self._timeout, self._waits = timeout, waits
        self._workers = [BackgroundWorker("webhook") for _ in endpoints]
        self._ending = threading.Event()

    @classmethod
    def from_config(cls, config: str | Path | Mapping[str, Any] | list[Any] | None, run_name: str) -> Webhook:
        """From the path of a JSON file or its content. What cannot be used gives one warning and is left out."""
        if config is None or config == "":
            return cls([])
        try:
            document = (
                json.loads(Path(config).read_text(encoding="utf-8")) if isinstance(config, str | Path) else config
            )
            entries = document if isinstance(document, list) else [document]
            return cls([_endpoint(entry, run_name) for entry in entries])
        except FileNotFoundError:
            log.warning("webhook_config: %s does not exist; no events are sent", config)
        except (OSError, ValueError) as error:
            where = config if isinstance(config, str | Path) else "the inline object"
            log.warning("webhook_config: %s cannot be used (%s); no events are sent", where, error)
        return cls([])

    def send(self, message: str, event: str = "notification", **fields: Any) -> None:
        """Queues one event and returns at once. `fields` go to raw endpoints beside the message."""
        message = _without_secrets(message)
        level = LEVELS.index("error" if event == "error" else "info")
        for endpoint, worker in zip(self.endpoints, self._workers, strict=True):
            if level < LEVELS.index(endpoint.level):
                continue
            if not worker.submit(lambda to=endpoint: self._deliver(to, message, event, fields)):  # type: ignore[misc]
                self._failed(endpoint, "too many events are waiting")

    def close(self, timeout: float = 10.0) -> bool:
        """Waits for the queued events, `timeout` seconds at most; attempts that fail from here on are the last."""
        self._ending.set()
        until = time.monotonic() + timeout
        return all([worker.close(max(0.0, until - time.monotonic())) for worker in self._workers])

    def _deliver(self, endpoint: Endpoint, message: str, event: str, fields: Mapping[str, Any]) -> None:
        for wait in (*self._waits, None):
            try:
                self._post(endpoint, message, event, fields)
                return
            except urllib.error.HTTPError as error:
                reason, again = f"HTTP status {error.code}", error.code in (408, 429) or error.code >= 500
                wait = wait and _asked_for(error, wait)
            except Exception as error:  # noqa: BLE001 - the outermost edge of an optional service
                # Only the type: the text of some errors holds the address, and the address is the secret.
                reason, again = type(error).__name__, isinstance(error, OSError)
            if wait is None or not again or self._ending.is_set():
                self._failed(endpoint, reason)
                return
            self._ending.wait(wait)

    def _post(self, endpoint: Endpoint, message: str, event: str, fields: Mapping[str, Any]) -> None:
        payload: dict[str, Any]
        if endpoint.kind == "discord":
            # No mentions: a prompt that says @everyone must not ring a whole server.
            text = f"`({endpoint.prefix})` {message}"[:DISCORD_LIMIT]
            payload = {"content": text, "allowed_mentions": {"parse": []}}
        else:
            payload = {**fields, "event": event, "run": endpoint.prefix, "message": message}
        headers = {"Content-Type": "application/json", "User-Agent": "simpletuner-dmd"}
        if endpoint.auth_token:
            headers["X-API-Key"] = endpoint.auth_token
        body = _without_secrets(json.dumps(payload, default=str)).encode()
        request = urllib.request.Request(endpoint.url, data=body, headers=headers, method="POST")
        context = None if endpoint.verify else ssl._create_unverified_context()  # noqa: S323 - asked for by name
        with urllib.request.urlopen(request, timeout=self._timeout, context=context):
            pass

    def _failed(self, endpoint: Endpoint, reason: str) -> None:
        sentence = f"the webhook at {endpoint.host} did not take an event: {reason}"
        self.failures.append(sentence)
        log.warning(sentence)


def _endpoint(entry: Any, run_name: str) -> Endpoint:
    if not isinstance(entry, Mapping):
        raise ValueError("expected a JSON object or a list of objects")
    url = entry.get("webhook_url") or entry.get("callback_url")
    kind = entry.get("webhook_type") or ("discord" if entry.get("webhook_url") else "raw")
    if kind not in ("discord", "raw"):
        raise ValueError(f'"webhook_type" must be "discord" or "raw", not {kind!r}')
    if not isinstance(url, str) or urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError('"webhook_url" (discord) or "callback_url" (raw) must be an http or https address')
    level = str(entry.get("log_level") or "info").lower()
    if level not in LEVELS:
        raise ValueError(f'"log_level" must be one of {", ".join(LEVELS)}, not {level!r}')
    if unknown := sorted(set(entry) - _KEYS):
        raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(sorted(_KEYS))}")
    verify = not entry.get("ssl_no_verify", False)
    prefix, token = str(entry.get("message_prefix") or run_name), str(entry.get("auth_token") or "")
    return Endpoint(url, kind, prefix, token, level, verify)


def _asked_for(error: urllib.error.HTTPError, otherwise: float) -> float:
    """Seconds to wait: as the endpoint asks (Discord does), within reason."""
    try:
        return min(float(error.headers.get("Retry-After", otherwise)), LONGEST_WAIT)
    except ValueError:
        return otherwise


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text
