"""One POST request within one deadline: for the name's look-up, the connection and the answer.

A socket's timeout is of each wait alone, so that a receiver that sends a byte now and then, or a
resolver that is silent, takes as long as it likes. The request has a thread of its own here, which
is left behind when the time is up, and then sends nothing more.
"""

import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from typing import IO, Any

__all__ = ["Answer", "post"]

#: A status of HTTP and its headers; what came instead, in words; or nothing in time.
Answer = tuple[int, Message] | str | None


def post(request: urllib.request.Request, timeout: float, context: ssl.SSLContext | None) -> Answer:
    """What a receiver answers within ``timeout`` seconds. A redirect is an answer."""
    call = _Call(request, timeout, context)
    thread = threading.Thread(target=call.run, name="ood-monitor post", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # while the interpreter shuts down; each wait has its timeout still
        call.run()
    else:
        thread.join(timeout)
    call.end()
    return call.answer


class _Call:
    """A request under way, which can be ended."""

    def __init__(
        self, request: urllib.request.Request, timeout: float, context: ssl.SSLContext | None
    ) -> None:
        self.answer: Answer = None
        self._request, self._timeout = request, timeout
        self._opener = urllib.request.build_opener(
            _NoRedirect, _Http(self.watched), _Https(self.watched, context)
        )
        self._changing = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self._is_over = False

    def run(self) -> None:
        answer = self._answer()
        with self._changing:
            self.answer = None if self._is_over else answer

    def end(self) -> None:
        """Have it send and read nothing more."""
        with self._changing:
            self._is_over = True
            connected = self._connection.sock if self._connection else None
        if connected is not None and self.answer is None:
            with suppress(OSError):  # of the socket itself: a TLS goodbye could wait
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def watched(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection:
        """A connection that this call ends with."""
        connect = connection.connect

        def connected() -> None:
            connect()
            with self._changing:
                self._connection = connection
                if self._is_over:
                    connection.close()
                    raise TimeoutError("timed out")

        connection.connect = connected  # type: ignore[method-assign]
        return connection

    def _answer(self) -> Answer:
        try:
            with self._opener.open(self._request, timeout=self._timeout) as answer:
                return answer.status, answer.headers
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, error.headers
        except Exception as error:  # urllib's URLError has the network's own as its reason
            return str(getattr(error, "reason", error)) or type(error).__name__


_Watch = Callable[[http.client.HTTPConnection], http.client.HTTPConnection]


class _Http(urllib.request.HTTPHandler):
    def __init__(self, watched: _Watch) -> None:
        super().__init__()
        self._watched = watched

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def _connection(self, host: str, **options: Any) -> http.client.HTTPConnection:
        return self._watched(http.client.HTTPConnection(host, **options))


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, watched: _Watch, context: ssl.SSLContext | None) -> None:
        super().__init__(context=context)
        self._watched, self._trusted = watched, context

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def _connection(self, host: str, **options: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPSConnection(host, context=self._trusted, **options)
        return self._watched(connection)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        return None  # urllib then raises the redirect as an error
