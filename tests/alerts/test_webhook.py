"""Webhooks: what is sent and signed, what a receiver can check, and what stays secret."""

import base64
import hashlib
import hmac
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.alert_cases import ALERT, LONG, alert
from support.receivers import Receiver, receiving

from ood_monitor.alerts import Alert, Dispatcher, WebhookError, WebhookSink, verify

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
OTHER = "whsec_" + base64.b64encode(KEY[::-1]).decode()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


# What is sent


def test_a_request_has_the_alert(receiver: Receiver) -> None:
    WebhookSink(receiver.url, secret=SECRET)(ALERT)
    [request] = receiver.requests
    assert request.path == "/hook"
    assert request.headers["content-type"] == "application/json"
    assert request.json["type"] == "ood_monitor.drift"
    assert request.json["timestamp"] == ALERT.time.isoformat()
    assert Alert.from_json(json.dumps(request.json["data"])) == ALERT


def test_a_request_is_signed_as_the_standard_says(receiver: Receiver) -> None:
    before = int(time.time())
    WebhookSink(receiver.url, secret=SECRET)(ALERT)
    [request] = receiver.requests
    assert request.headers["webhook-id"] == ALERT.id
    timestamp = request.headers["webhook-timestamp"]
    assert before <= int(timestamp) <= time.time()
    content = b".".join([ALERT.id.encode(), timestamp.encode(), request.body])
    digest = base64.b64encode(hmac.new(KEY, content, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{digest}"
    verify(request.body, request.headers, SECRET)


def test_the_example_of_the_standard_verifies() -> None:
    # The test vector of the standard's reference libraries.
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    verify(b'{"test": 2432232314}', headers, secret, tolerance=1e12)


def test_a_payload_of_your_own_is_signed_too(receiver: Receiver) -> None:
    sink = WebhookSink(
        receiver.url,
        secret=SECRET,
        payload=lambda alert: {"text": alert.message},
        headers={"Authorization": "Bearer x"},
    )
    sink(ALERT)
    [request] = receiver.requests
    assert request.json == {"text": ALERT.message}
    assert request.headers["authorization"] == "Bearer x"
    verify(request.body, request.headers, SECRET)


def test_without_a_secret_there_is_no_signature(receiver: Receiver) -> None:
    WebhookSink(receiver.url)(ALERT)
    [request] = receiver.requests
    assert "webhook-signature" not in request.headers
    assert request.headers["webhook-id"] == ALERT.id


# What a receiver refuses


def request_of(receiver: Receiver) -> tuple[bytes, dict[str, str]]:
    WebhookSink(receiver.url, secret=SECRET)(ALERT)
    [request] = receiver.requests
    return request.body, dict(request.headers)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_header_that_is_missing_or_changed_is_refused(name: str, receiver: Receiver) -> None:
    body, headers = request_of(receiver)
    changed = headers | {name: headers[name][:-2] + "00"}
    with pytest.raises(ValueError, match="another signature"):
        verify(body, changed, SECRET)
    del headers[name]
    with pytest.raises(ValueError, match=f"got one without {name}"):
        verify(body, headers, SECRET)


def test_a_changed_body_or_secret_is_refused(receiver: Receiver) -> None:
    body, headers = request_of(receiver)
    for changed, secret in ((body.replace(b"drift", b"draft"), SECRET), (body, OTHER)):
        with pytest.raises(ValueError, match="another signature"):
            verify(changed, headers, secret)


def test_an_old_request_is_refused(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    body, headers = request_of(receiver)
    later = time.time() + 301
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        with pytest.raises(ValueError, match=r"Expected a request of the last 300 s, got"):
            verify(body, headers, SECRET)
        verify(body, headers, SECRET, tolerance=1000)


def test_one_of_several_signatures_is_enough(receiver: Receiver) -> None:
    body, headers = request_of(receiver)
    headers["webhook-signature"] = "v1,b2xk " + headers["webhook-signature"] + " v2,ä"
    verify(body, headers, SECRET)


# Failures


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 404, 410, 429, 500, 503])
def test_any_other_answer_is_a_failure(status: int, receiver: Receiver) -> None:
    receiver.status = status
    receiver.headers = {"Location": receiver.url + "/elsewhere"}
    with pytest.raises(WebhookError, match=f"Expected a 2xx of 127.0.0.1, got status {status}"):
        WebhookSink(receiver.url)(ALERT)
    assert len(receiver.requests) == 1  # a redirect is not followed


def test_a_dead_receiver_is_a_failure() -> None:
    with receiving() as receiver:
        url = receiver.url
    with pytest.raises(WebhookError, match="Connection refused"):
        WebhookSink(url)(ALERT)


def test_a_receiver_that_hangs_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(WebhookError, match="timed out"):
            WebhookSink(url, timeout=0.05)(ALERT)
        assert time.monotonic() - start < LONG / 3


def test_a_failure_is_tried_again_with_the_same_id(receiver: Receiver) -> None:
    receiver.status = 503
    with Dispatcher([WebhookSink(receiver.url, secret=SECRET)]) as dispatcher:
        dispatcher.send(ALERT)
        assert receiver.wait_for(1)
        receiver.status = 204
        assert dispatcher.flush(LONG)
    assert len(receiver.requests) >= 2
    assert {request.headers["webhook-id"] for request in receiver.requests} == {ALERT.id}
    for request in receiver.requests:
        verify(request.body, request.headers, SECRET)


# What stays secret


def test_secrets_are_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    with receiving() as receiver:
        url = f"{receiver.url}/T0KEN"
    sink = WebhookSink(url, secret=SECRET, headers={"Authorization": "Bearer T0KEN"})
    with caplog.at_level(logging.DEBUG), Dispatcher([sink], tries=1) as dispatcher:
        dispatcher.send(ALERT)
        assert dispatcher.flush(LONG)
    shown = caplog.text + repr(sink) + str(sink) + repr(dispatcher.undelivered)
    assert "127.0.0.1" in shown
    for secret in ("T0KEN", SECRET, SECRET[6:], KEY.hex(), repr(KEY)):
        assert secret not in shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.slack.com/T0KEN",
        "ftp://host/T0KEN",
        "file:///etc/T0KEN",
        "https:///T0KEN",
        "https://host/T0 KEN",
        "https://host/T0KEN\n",
        "https://host/T0KENä",
        "http://host:port/T0KEN",
        "https://[host/T0KEN",
    ],
)
def test_what_is_no_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="Expected a URL as https://host/path") as caught:
        WebhookSink(url)
    assert "T0KEN" not in str(caught.value)


def test_a_user_in_the_address_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected no user in the URL of host") as caught:
        WebhookSink("https://me:T0KEN@host/path")
    assert "T0KEN" not in str(caught.value)


@pytest.mark.parametrize(
    "secret", ["", "T0KEN", SECRET[6:], "whsec_T0KEN", "whsec_!!!!" + "A" * 40, "whsec_" + "A" * 28]
)
def test_what_is_no_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="Expected a secret of whsec_ and the Base64") as caught:
        WebhookSink("https://host", secret=secret)
    assert not secret or secret not in str(caught.value)


# A receiver that is killed in mid-stream


SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with open(sys.argv[1], "a") as file:
            print(self.headers["webhook-id"], file=file, flush=True)
        self.send_response(204)
        self.end_headers()
    def log_message(self, *args):
        pass
class Server(ThreadingHTTPServer):
    allow_reuse_address = True
server = Server(("127.0.0.1", int(sys.argv[2])), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def served(log: Path, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", SERVER, str(log), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, int(server.stdout.readline())


def ended(server: subprocess.Popen[Any]) -> None:
    server.kill()
    server.communicate()


@pytest.mark.parametrize("spooled", [False, True])
def test_a_receiver_killed_and_restarted_gets_every_alert(tmp_path: Path, spooled: bool) -> None:
    log = tmp_path / "log"
    server, port = served(log)
    longest = 0.0
    spool = tmp_path / "spool" if spooled else None
    sink = WebhookSink(f"http://127.0.0.1:{port}/", secret=SECRET)
    with Dispatcher([sink], spool=spool) as dispatcher:
        for number in range(30):
            if number == 10:
                assert dispatcher.flush(LONG)
                ended(server)
            if number == 20:
                server, _ = served(log, port)
            start = time.monotonic()
            dispatcher.send(replace(alert(number)))
            longest = max(longest, time.monotonic() - start)
        assert dispatcher.flush(LONG)
        assert dispatcher.undelivered_count == 0
    ended(server)
    assert log.read_text().split() == [alert(number).id for number in range(30)]
    assert longest < LONG / 3  # nothing was waited for
