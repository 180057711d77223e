"""Webhooks: what is sent and signed, what a receiver can check, and what stays secret."""

import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.alert_cases import ALERT, LONG, alert, ended, run
from support.receivers import Receiver, receiving

from ood_monitor.alerts import (
    Alert,
    Dispatcher,
    Refused,
    WebhookError,
    WebhookRefused,
    WebhookSink,
    verify,
)

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


FOR_GOOD = [301, 308, 400, 401, 403, 404, 405, 409, 410, 413, 422]
FOR_NOW = [302, 303, 307, 408, 423, 425, 429, 500, 501, 503]


@pytest.mark.parametrize("status", [*FOR_GOOD, *FOR_NOW])
def test_any_other_answer_is_a_failure(status: int, receiver: Receiver) -> None:
    receiver.status = status
    receiver.headers = {"Location": receiver.url + "/elsewhere"}
    text = f"Expected a 2xx of 127.0.0.1, got status {status}"
    with pytest.raises(WebhookError, match=text) as caught:
        WebhookSink(receiver.url)(ALERT)
    assert len(receiver.requests) == 1  # a redirect is not followed
    assert isinstance(caught.value, WebhookRefused) == (status in FOR_GOOD)
    assert isinstance(caught.value, Refused) == (status in FOR_GOOD)


def test_what_a_receiver_refuses_for_good_is_sent_once(receiver: Receiver, tmp_path: Path) -> None:
    receiver.status = 410
    sink = WebhookSink(receiver.url)
    with Dispatcher([sink], spool=tmp_path) as dispatcher:
        dispatcher.send(alert(1))
        dispatcher.send(alert(2))
        assert dispatcher.flush(LONG)
        assert dispatcher.refused == {sink.name: 2}
        assert "status 410" in dispatcher.undelivered[0].reason
    assert [request.headers["webhook-id"] for request in receiver.requests] == [
        alert(1).id,
        alert(2).id,
    ]


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("7", 7, 7),
        (100_000.0, 99_000, 100_000),
        (-100.0, -200, -99),
        ("soon", None, None),
        ("", None, None),
    ],
)
def test_what_a_receiver_asks_to_wait_is_passed_on(
    asked: str | float, least: float | None, most: float | None, receiver: Receiver
) -> None:
    told = asked if isinstance(asked, str) else in_seconds(asked)
    receiver.status, receiver.headers = 429, {"Retry-After": told}
    with pytest.raises(WebhookError) as caught:
        WebhookSink(receiver.url)(ALERT)
    found = caught.value.retry_after
    if least is None or most is None:
        assert found is None
    else:
        assert found is not None
        assert least <= found <= most


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


def dripping(server: socket.socket) -> None:
    """Answer a byte now and then: no wait on the network is long."""
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
                    connection.send(bytes([byte]))
                    time.sleep(0.01)


def test_a_receiver_that_drips_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=dripping, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(WebhookError, match=r"got none in 0.2 s \(timed out\)"):
            WebhookSink(url, timeout=0.2)(ALERT)
        assert time.monotonic() - start < LONG / 3  # it would drip for 100 s
        assert ended(lambda: not posting())  # and nothing goes on behind the back
        server.shutdown(socket.SHUT_RDWR)


def posting() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ood-monitor post"]


def test_a_name_that_is_not_found_in_time_is_not_waited_for_and_nothing_is_sent_late(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, real = threading.Event(), socket.getaddrinfo

    def getaddrinfo(*arguments: Any, **options: Any) -> Any:
        answers.wait(LONG)
        return real(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(WebhookError, match="timed out"):
        WebhookSink(receiver.url, timeout=0.05)(ALERT)
    answers.set()
    assert ended(lambda: not posting())
    assert receiver.requests == []


def test_a_process_that_ends_delivers_still(receiver: Receiver) -> None:
    script = """
import sys
from ood_monitor.alerts import Alert, Dispatcher, WebhookSink
Dispatcher([WebhookSink(sys.argv[2])]).send(Alert.from_json(sys.argv[1]))
"""
    process = run(script, ALERT.to_json(), receiver.url)
    assert (process.returncode, process.stderr) == (0, "")
    assert [request.headers["webhook-id"] for request in receiver.requests] == [ALERT.id]


def certified(folder: Path) -> Path:
    """A certificate of 127.0.0.1 with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_a_receiver_with_a_certificate_is_trusted_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certified(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with receiving(context=context) as receiver:
        url = receiver.url.replace("http:", "https:")
        with pytest.raises(WebhookError, match="certificate verify failed"):
            WebhookSink(url)(ALERT)
        assert receiver.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        WebhookSink(url)(ALERT)
        assert [request.headers["webhook-id"] for request in receiver.requests] == [ALERT.id]


# Names


def test_a_receivers_name_is_its_addresses_and_shows_none_of_it() -> None:
    urls = ["https://host/T0KEN", "https://host/T0KEN2", "https://other/T0KEN", "http://host/T0KEN"]
    names = [WebhookSink(url).name for url in urls]
    assert len(set(names)) == len(urls)
    assert names == [WebhookSink(url, secret=SECRET).name for url in urls]
    assert names[0].startswith("WebhookSink host ")
    assert not any("T0KEN" in name for name in names)
    assert WebhookSink(urls[0], name="pager").name == "pager"


def test_a_receiver_at_another_address_gets_nothing_of_the_one_before(tmp_path: Path) -> None:
    with receiving() as gone, Dispatcher([WebhookSink(gone.url)], tries=1, spool=tmp_path) as first:
        gone.status = 500
        first.send(alert(1))
        assert first.flush(LONG)
    with receiving() as new, Dispatcher([WebhookSink(new.url)], spool=tmp_path) as second:
        second.send(alert(2))
        assert second.flush(LONG)
        assert [request.headers["webhook-id"] for request in new.requests] == [alert(2).id]


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


def killed(server: subprocess.Popen[Any]) -> None:
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
                killed(server)
            if number == 20:
                server, _ = served(log, port)
            start = time.monotonic()
            dispatcher.send(replace(alert(number)))
            longest = max(longest, time.monotonic() - start)
        assert dispatcher.flush(LONG)
        assert dispatcher.undelivered_count == 0
    killed(server)
    assert log.read_text().split() == [alert(number).id for number in range(30)]
    assert longest < LONG / 3  # nothing was waited for
