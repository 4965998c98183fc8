"""A download server on loopback that does what servers should not."""
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import cifar10
from options import Fault

import pytest
from test_cifar10 import Server, archive, equal_batches, files, served  # noqa: F401

HEAD = "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n"


def reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextlib.contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that reads each request and leaves all the rest to `answer`."""
    listening, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve() -> None:
        while True:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                if over.is_set():
                    return
                connection.recv(65536)
                answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listening.getsockname()[1]
    yield f"http://127.0.0.1:{port}/cifar-10-binary.tar.gz"
    over.set()
    socket.create_connection(("127.0.0.1", port)).close()
    thread.join(10)
    listening.close()


def part(promised: str, then: Callable[[socket.socket], None] = lambda connection: None) -> Callable:
    """Send a head that promises so many bytes, some bytes, and then do something."""
    def answer(connection: socket.socket) -> None:
        connection.sendall(HEAD.format(promised).encode() + b"x" * 5000)
        then(connection)
    return answer


def redirect(place: str) -> Callable:
    return lambda connection: connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {place}\r\n\r\n".encode())


ANSWERS = {
    "stalls at once": (lambda connection: time.sleep(0.5), "can't be reached (timed out)"),
    "stalls half way": (part("9000", lambda connection: time.sleep(0.5)), "broke off (timed out)"),
    "resets at once": (reset, "can't be reached"),
    "resets half way": (part("99999999", reset), "broke off"),
    "promises more": (part("9000"), "got 5,000 bytes"),
    "promises less": (part("3000"), "got 3,000 bytes"),
    "promises nonsense": (part("-many"), "got 5,000 bytes"),
    "chunks of nonsense": (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
                           "broke off"),
    "no HTTP": (lambda connection: connection.sendall(b"\x00" * 3000), "can't be reached"),
    "an endless head": (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 999),
                        "can't be reached"),
    "sends elsewhere: a file": (redirect("file:///etc/passwd"), "answered 302"),
    "sends elsewhere: itself": (redirect("/cifar-10-binary.tar.gz"), "answered 302"),
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_servers_that_fail(tmp_path, monkeypatch, fault):
    answer, words = ANSWERS[fault]
    with server(answer) as url, pytest.raises(Fault) as caught:
        monkeypatch.setenv("PEGASUS_CIFAR10_URL", url)
        cifar10.download(tmp_path / "data", timeout=0.2 if "stalls" in fault else 8.0)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "data") == []


def test_a_redirect_is_held_to_the_digest(equal_batches, tmp_path, monkeypatch):  # noqa: F811
    """Wherever the bytes come from, they are CIFAR-10's or none."""
    body = archive(equal_batches)
    served(monkeypatch, body)
    for there, kept in ((body, 6), (body[:-1] + bytes([body[-1] ^ 1]), 0)):
        with Server(there) as elsewhere, server(redirect(elsewhere)) as url:
            monkeypatch.setenv("PEGASUS_CIFAR10_URL", url)
            with contextlib.nullcontext() if kept else pytest.raises(Fault, match="SHA-256"):
                cifar10.download(tmp_path / str(kept))
        assert len(files(tmp_path / str(kept))) == kept


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://[", "http://127.0.0.1:99999/", "gopher://x/y"])
def test_addresses_that_are_none(tmp_path, monkeypatch, url):
    monkeypatch.setenv("PEGASUS_CIFAR10_URL", url)
    with pytest.raises(Fault, match="can't be reached"):
        cifar10.download(tmp_path)
