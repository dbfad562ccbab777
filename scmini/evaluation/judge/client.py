"""One request to a judge, and what became of it: any server that speaks OpenAI's chat API.

The key comes from an environment variable. It is in no message, no file and no `repr`, and it is
never sent anywhere but to `base_url`: redirects are refused. Proxies are taken from the usual
environment variables.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from scmini import console
from scmini.errors import ConfigError, EnvironmentProblem, ServiceError
from scmini.evaluation.judge.reply import (
    CONNECTION_LOST,
    REFUSED,
    SERVER_ERROR,
    TIMED_OUT,
    TOO_LONG,
    TOO_MANY,
    Reply,
    as_number,
    read_reply,
)
from scmini.quoting import plain
from scmini.records import Message

_ANSWER_BYTES = 1 << 24
_LONGEST_DETAIL = 300
_SHORTEST_SECRET = 8
"""Shorter keys are placeholders for local servers (EMPTY, none), which occur in ordinary texts."""
_TELLS_LENGTH = re.compile(r"context.?length|maximum context|too many tokens|max_model_len", re.I)


class Endpoint:
    """A server's `/chat/completions`, safe to use from several threads.

    Args:
        base_url: such as https://api.openai.com/v1; a query is kept.
        key_variable: environment variable that holds the key; a server may need none.
        timeout: seconds for a whole request.

    Raises:
        ConfigError: `base_url` is no plain http(s) address.
        EnvironmentProblem: the variable holds what cannot be a key.
    """

    def __init__(self, base_url: str, key_variable: str, timeout: float) -> None:
        self._url, self.shown = _address(base_url)
        self._key_variable = key_variable
        self._key = _key(key_variable)
        self._timeout = timeout
        self._opener = urllib.request.OpenerDirector()
        for handler in (  # none that follows redirects: they would carry the key elsewhere
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            self._opener.add_handler(handler)
        self._lock = threading.Lock()
        self._limit_name = "max_tokens"
        self._own_temperature = False

    def send(self, model: str, messages: Sequence[Message], settings: Mapping[str, Any]) -> Reply:
        """Ask once.

        Args:
            settings: further fields of the request: `temperature`, `max_tokens` and so on.

        Returns:
            The answer, or a `Reply` whose outcome says why there is none.

        Raises:
            ServiceError: asking again, or asking anything else, is useless.
        """
        while True:
            # As they were sent: another thread may learn meanwhile what the server takes.
            form = self._limit_name, self._own_temperature
            body = {"model": model, "messages": list(messages), **self._named(settings, form)}
            status, headers, text = self._post(json.dumps(body).encode())
            if status == 200:
                return read_reply(text)
            if status == 0:
                return Reply(text.partition(": ")[0], text)
            if not (status == 400 and self._learns(text, form)):
                return self._refused(status, headers, text, model)

    def _named(self, settings: Mapping[str, Any], form: tuple[str, bool]) -> dict[str, Any]:
        limit_name, own_temperature = form
        found = {limit_name if k == "max_tokens" else k: v for k, v in settings.items()}
        if own_temperature:
            found.pop("temperature", None)
        return found

    def _learns(self, text: str, form: tuple[str, bool]) -> bool:
        """Whether the server rejected a field that its newer models call otherwise or fix."""
        error = _error(text)
        with self._lock:
            if form != (self._limit_name, self._own_temperature):
                return True
            unknown = error.get("param") == "max_tokens" or "max_completion_tokens" in text
            if unknown and self._limit_name == "max_tokens":
                self._limit_name = "max_completion_tokens"
                return True
            if error.get("param") == "temperature" and not self._own_temperature:
                self._own_temperature = True
                console.warn("the judge takes no temperature of 0: it answers at its own")
                return True
        return False

    def _post(self, data: bytes) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text; status 0 with "<outcome>: <reason>" where none came."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data=data, headers=headers, method="POST")
        deadline = time.monotonic() + self._timeout
        try:
            try:
                response: Any = self._opener.open(request, timeout=self._timeout)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                raw = _read(response, deadline)
                return response.status, response.headers, self._redacted(raw)
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            late = isinstance(reason, TimeoutError)
            kind = TIMED_OUT if late else CONNECTION_LOST
            told = f"{self._timeout:g} s" if late else str(reason) or type(reason).__name__
            return 0, {}, self._redacted(f"{kind}: {told}".encode())

    def _refused(self, status: int, headers: Mapping[str, str], text: str, model: str) -> Reply:
        error = _error(text)
        detail = plain(error.get("message") or "", _LONGEST_DETAIL)
        if status in (408, 409, 425, 429) or status >= 500:
            if error.get("code") == "insufficient_quota":
                raise ServiceError(
                    f"judge: {self.shown}: the account has no credit left ({detail})"
                )
            kind = TOO_MANY if status == 429 else SERVER_ERROR
            wait = _retry_after(headers.get("Retry-After"))
            return Reply(kind, f"HTTP {status} {detail}".strip(), wait=wait)
        if status in (400, 413, 422):
            if error.get("code") == "content_filter":
                return Reply(REFUSED, detail)
            if error.get("code") == "context_length_exceeded" or _TELLS_LENGTH.search(detail):
                return Reply(TOO_LONG, detail)
        raise ServiceError(self._complaint(status, detail, model, headers.get("Location")))

    def _complaint(self, status: int, detail: str, model: str, location: str | None) -> str:
        told = f"judge: {self.shown} answers HTTP {status}"
        if status == 401:  # its text may quote the key
            remedy = "holds no key" if not self._key else "holds a key that it does not accept"
            return f"{told}: the environment variable {self._key_variable} {remedy} " + (
                "(judge.api_key_variable names the variable)"
            )
        said = f"{told} ({detail})" if detail else told
        if 300 <= status < 400:
            moved = "elsewhere"
            with contextlib.suppress(ConfigError):
                moved = _address(location or "")[1]
            return f"{told} and points to {moved}; put the right address into judge.base_url"
        if status == 403:
            return f"{said}: the key in {self._key_variable} may not use judge.model: {model}"
        if status == 404:
            return f"{said}: check judge.model ({model}) and judge.base_url (it often ends in /v1)"
        return (
            f"{said}: it does not accept the request; check judge.model ({model}) and "
            "judge.max_tokens (where log-probabilities are refused: judge.alpaca_eval_version: 1)"
        )

    def _redacted(self, raw: bytes) -> str:
        """Text without echoes of the key or the address's query; what is no UTF-8 stays visible."""
        text = raw.decode("utf-8", errors="backslashreplace")
        for secret in (self._key, urlsplit(self._url).query):
            if len(secret) >= _SHORTEST_SECRET:
                for written in _spellings(secret):
                    text = text.replace(written, "***")
        return text


def _spellings(secret: str) -> list[str]:
    """A key as JSON and addresses write it, the longest first."""
    found = {secret, json.dumps(secret)[1:-1], secret.replace("/", "\\/"), quote(secret, safe="")}
    return sorted(found, key=len, reverse=True)


def _address(base_url: str) -> tuple[str, str]:
    """The URL to post to, and how it is shown: without its query, which may hold a key."""
    try:
        parts = urlsplit(base_url.strip())
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host or re.search(r"[^!-~]", base_url.strip()):
        raise ConfigError(
            "judge.base_url: expected an address such as https://api.openai.com/v1 or "
            "http://localhost:8000/v1"
        )
    if "@" in parts.netloc:
        raise ConfigError(
            "judge.base_url: a name or password in the address would be shown in messages; put the "
            "key into the environment variable that judge.api_key_variable names"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    url = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
    return url, f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if re.search(r"[^!-~]", key):
        raise EnvironmentProblem(
            f"the environment variable {variable} (judge.api_key_variable) holds characters that "
            "no key has; set it again"
        )
    return key


def _read(response: Any, deadline: float) -> bytes:
    """The body, within the time for the whole request."""
    found = bytearray()
    while chunk := response.read1(1 << 16):
        found += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(found) > _ANSWER_BYTES:
            raise http.client.HTTPException(f"an answer of more than {_ANSWER_BYTES >> 20} MiB")
    if getattr(response, "length", None):
        raise http.client.HTTPException("the answer broke off")
    return bytes(found)


def _error(text: str) -> dict[str, Any]:
    """The error object of a server's answer, however it is wrapped; empty if there is none."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if isinstance(data, dict):
        inner = data.get("error", data)
        if isinstance(inner, str):
            return {"message": inner}
        if isinstance(inner, dict):
            return inner
    return {}


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if value is None:
        return None
    seconds = as_number(value)
    if seconds is None:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds)
