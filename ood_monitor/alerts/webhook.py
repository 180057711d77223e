"""Alerts to a webhook: signed as the Standard Webhooks say, so that a receiver knows the sender.

A request has the headers ``webhook-id`` (the alert's id, the same through every try),
``webhook-timestamp`` (seconds since 1970, of this try) and, with a secret, ``webhook-signature``:
``v1,`` and the Base64 of HMAC-SHA256 over ``id.timestamp.body``. :func:`verify` checks it.

References:
    Standard Webhooks, https://www.standardwebhooks.com
"""

import base64
import hashlib
import hmac
import json
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ood_monitor.alerts.alert import Alert
from ood_monitor.alerts.failures import Refused
from ood_monitor.alerts.posting import post
from ood_monitor.checks import function, number, text

__all__ = ["WebhookError", "WebhookRefused", "WebhookSink", "verify"]

_ID, _TIMESTAMP, _SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
_PREFIX = "whsec_"
_SHORTEST_KEY = 24  # bytes, as the standard has it
_LONGEST_WAIT = 86_400.0  # seconds; sockets take no such time as infinity
_DIGITS = 12  # of the address's digest in a sink's name

#: Answers that the same request gets again: a redirect for good, and what blames the request, but
#: for those that ask to wait.
_FOR_GOOD = {301, 308, *range(400, 500)} - {408, 423, 425, 429}


class WebhookError(Exception):
    """A receiver did not take an alert; names the host, not the address, which may be secret.

    Attributes:
        retry_after: Seconds that the receiver asks to wait; None if it does not.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WebhookRefused(WebhookError, Refused):
    """A receiver will not take an alert, however often it is sent."""


class WebhookSink:
    """Posts each alert as JSON, and raises unless the answer is a 2xx.

    The body is ``{"type": "ood_monitor.drift", "timestamp": ..., "data": ALERT}``, or what
    ``payload`` makes of the alert: ``lambda alert: {"text": alert.message}`` is what Slack takes.
    A redirect is refused, since it would carry the alert to an address that nobody chose. Proxies
    are those of the environment. What blames the request, such as 400, 401, 404 or 410, and a
    redirect for good, is a :class:`~ood_monitor.alerts.Refused`; 408, 429 and 5xx are tried again,
    as late as ``Retry-After`` says.

    Args:
        url: ``https://...``, or ``http://...`` where nobody listens in between.
        secret: ``whsec_`` and the Base64 of 24 bytes or more, which the receiver has too. None for
            a receiver that knows the sender by the address alone.
        timeout: Seconds for a call in all, a day at most.
        payload: Makes the body, which JSON can hold, of an alert.
        headers: More headers, such as ``Authorization``; they do not show in ``repr``.
        name: What a spool and the counts know this receiver by; by default its host and a digest
            of its address, so that another address is another receiver.

    Raises:
        ValueError: The URL, the secret or a header is not one, or the timeout not in (0, a day].
        TypeError: An option of another type.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str | None = None,
        timeout: float = 10.0,
        payload: Callable[[Alert], Any] | None = None,
        headers: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        self._host = _checked_host(url)
        self.name = _name(self._host, url) if name is None else text("name", name)
        self._url, self._timeout = url, number("timeout", timeout, 0, _LONGEST_WAIT, ends="(]")
        self._key = None if secret is None else _key(secret)
        self._payload = _event if payload is None else function("payload", payload)
        self._headers = {"Content-Type": "application/json", "User-Agent": "ood-monitor"}
        self._headers |= _checked_headers({} if headers is None else headers)
        is_safe = urlsplit(url).scheme == "https"
        self._context = ssl.create_default_context() if is_safe else None

    def __repr__(self) -> str:
        return f"WebhookSink({self._host!r}, signed={self._key is not None})"

    def __call__(self, alert: Alert, /) -> None:
        """Post `alert`.

        Raises:
            WebhookRefused: The receiver will not take it, however often it is sent.
            WebhookError: The receiver cannot be reached, or does not answer with a 2xx in time.
        """
        body = json.dumps(self._payload(alert), allow_nan=False).encode()
        headers = self._headers | self._signed(alert.id, body)
        request = urllib.request.Request(self._url, body, headers, method="POST")
        answer = post(request, self._timeout, self._context)
        if isinstance(answer, str) or answer is None:
            raise WebhookError(self._expected(answer or f"none in {self._timeout:g} s (timed out)"))
        status, found = answer
        if status in _FOR_GOOD:
            raise WebhookRefused(self._expected(f"status {status}"))
        if not 200 <= status < 300:
            raise WebhookError(self._expected(f"status {status}"), _pause(found["Retry-After"]))

    def _expected(self, found: str) -> str:
        return f"Expected a 2xx of {self._host}, got {found}."

    def _signed(self, alert_id: str, body: bytes) -> dict[str, str]:
        timestamp = str(int(time.time()))
        headers = {_ID: alert_id, _TIMESTAMP: timestamp}
        if self._key is not None:
            headers[_SIGNATURE] = _signature(self._key, alert_id, timestamp, body)
        return headers


def verify(
    body: bytes, headers: Mapping[str, str], secret: str, *, tolerance: float = 300.0
) -> None:
    """Check, at a receiver, that a request is from who has the secret, unchanged and new.

    A repeated ``webhook-id`` within the tolerance is for the receiver to notice.

    Args:
        body: The request's body, as it came.
        headers: Its headers, in any case.
        secret: As the sink has it.
        tolerance: Seconds between the sender's clock and this one, and on the way, at most.

    Raises:
        ValueError: A header is missing, or the signature or the time is not right.
        TypeError: The tolerance is no number.
    """
    tolerance = number("tolerance", tolerance, 0)
    found = {name.lower(): value for name, value in headers.items()}
    if missing := [name for name in (_ID, _TIMESTAMP, _SIGNATURE) if name not in found]:
        raise ValueError(f"Expected a signed request, got one without {', '.join(missing)}.")
    expected = _signature(_key(secret), found[_ID], found[_TIMESTAMP], body)
    # Several while a secret is changed, with spaces between.
    given = [signature.encode() for signature in found[_SIGNATURE].split(" ")]
    if not any([hmac.compare_digest(signature, expected.encode()) for signature in given]):
        raise ValueError("Expected a request signed with the secret, got another signature.")
    age = time.time() - float(found[_TIMESTAMP])
    if not abs(age) <= tolerance:
        raise ValueError(f"Expected a request of the last {tolerance:g} s, got one of {age:.0f} s.")


def _name(host: str, url: str) -> str:
    """Of one receiver: the address is in it by a digest alone, since it may be secret."""
    return f"WebhookSink {host} {hashlib.sha256(url.encode()).hexdigest()[:_DIGITS]}"


def _pause(asked: str | None) -> float | None:
    """Seconds that a `Retry-After` asks for, by a number or a date; None if by neither."""
    if asked is None:
        return None
    if asked.strip().isdecimal():
        return float(asked)
    try:
        until = parsedate_to_datetime(asked)
        return (until - datetime.now(until.tzinfo)).total_seconds()
    except (TypeError, ValueError):
        return None


def _event(alert: Alert) -> dict[str, Any]:
    return {
        "type": f"ood_monitor.{alert.kind}",
        "timestamp": alert.time.isoformat(),
        "data": json.loads(alert.to_json()),
    }


def _checked_host(url: str) -> str:
    """The host of an address that can be posted to; the address itself is told to nobody."""
    if not isinstance(url, str):
        raise TypeError(f"Expected a URL as https://host/path, got {type(url).__name__}.")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if not host or parts.scheme not in ("http", "https") or not is_plain:
        raise ValueError("Expected a URL as https://host/path, got another text (not shown).")
    if parts.username is not None:
        raise ValueError(f"Expected no user in the URL of {host}: pass `headers` instead.")
    return host


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that can be sent; what is in them is told to nobody."""
    if not isinstance(headers, Mapping):
        raise TypeError(f"Expected headers by name, got {type(headers).__name__}.")
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("Expected headers as text by text, got another type (not shown).")
        if not (name.isascii() and name.isprintable() and value.isprintable()):
            raise ValueError("Expected headers of one line each, got another text (not shown).")
    return dict(headers)


def _key(secret: str) -> bytes:
    if not isinstance(secret, str):
        raise TypeError(f"Expected a secret as text, got {type(secret).__name__}.")
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not secret.startswith(_PREFIX) or len(key) < _SHORTEST_KEY:
        raise ValueError(
            f"Expected a secret of {_PREFIX} and the Base64 of at least {_SHORTEST_KEY} bytes, got "
            "another text (not shown)."
        )
    return key


def _signature(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    content = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
