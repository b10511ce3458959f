"""One POST per event to a Discord or plain JSON endpoint. A failure is a warning; a run never waits for it.

The config file is SimpleTuner's: {"webhook_type": "discord", "webhook_url": …} or {"webhook_type": "raw",
"callback_url": …}, optionally "message_prefix"; or a list of such objects.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner_dmd.publish.background import BackgroundWorker

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
DISCORD_LIMIT = 2000
# Values of these are taken out of every message.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class Endpoint:
    url: str
    kind: str  # "discord" | "raw"
    prefix: str
    auth_token: str = ""

    @property
    def host(self) -> str:
        """What may be named in a log: the path of a webhook address is its password."""
        return urllib.parse.urlsplit(self.url).hostname or "?"


class Webhook:
    """Sends events to the endpoints from a background thread. Without endpoints it does nothing."""

    def __init__(self, endpoints: list[Endpoint], timeout: float = TIMEOUT_SECONDS) -> None:
        self.endpoints = endpoints
        self.failures: list[str] = []
        self._timeout = timeout
        self._worker = BackgroundWorker("webhook")

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
        for endpoint in self.endpoints:
            if not self._worker.submit(lambda to=endpoint: self._post(to, message, event, fields)):  # type: ignore[misc]
                self._failed(endpoint, "too many events are waiting")

    def close(self, timeout: float = 10.0) -> bool:
        """Waits for the queued events, `timeout` seconds at most."""
        return self._worker.close(timeout)

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
        try:
            body = _without_secrets(json.dumps(payload, default=str)).encode()
            request = urllib.request.Request(endpoint.url, data=body, headers=headers, method="POST")
            with urllib.request.urlopen(request, timeout=self._timeout):
                pass
        except urllib.error.HTTPError as error:
            self._failed(endpoint, f"HTTP status {error.code}")
        except Exception as error:  # noqa: BLE001 - the outermost edge of an optional service
            # Only the type: the text of some errors holds the address, and the address is the secret.
            self._failed(endpoint, type(error).__name__)

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
    return Endpoint(url, kind, str(entry.get("message_prefix") or run_name), str(entry.get("auth_token") or ""))


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text
