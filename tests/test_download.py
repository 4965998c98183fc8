"""Downloads from servers on loopback, which do what servers should not, too."""
import contextlib
import hashlib
import http.server
import io
import signal
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pegasus import cli
from pegasus.cli import UserError
from pegasus.data import cifar10, datasets, download
from pegasus.data.cifar10 import RECORD

import pytest

BATCHES = cifar10.TRAIN + cifar10.TEST
ARCHIVE = "cifar-10-binary.tar.gz"


class Server:
    """A server that answers everything with the same bytes, or fewer than it says."""

    def __init__(self, body: bytes, status: int = 200, promised: int | None = None):
        length = len(body) if promised is None else promised

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/{ARCHIVE}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def archive(batches: Path, *more: str) -> bytes:
    """The batches as an archive in CIFAR-10's layout, with some more members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in more:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        for name in BATCHES:
            tar.add(batches / name, f"{cifar10.FOLDER}/{name}")
    return out.getvalue()


def expect(monkeypatch, body: bytes, size: int | None = None) -> None:
    """Hold downloads to the size and digest of these bytes."""
    monkeypatch.setattr(download, "SIZE", len(body) if size is None else size)
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(body).hexdigest())


def download_from(monkeypatch, url: str, parent: Path, **options: float) -> Path:
    monkeypatch.setenv("PEGASUS_CIFAR10_URL", url)
    return download.download(parent, **options)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def equal_batches(own_batches, monkeypatch) -> Path:
    """Batches of one size, as the official ones are."""
    for name in BATCHES:
        path = own_batches / name
        path.write_bytes(path.read_bytes()[: 40 * RECORD])
    monkeypatch.setattr(download, "BATCH_SIZE", 40 * RECORD)
    return own_batches


def test_download(equal_batches, tmp_path, monkeypatch, capsys):
    body = archive(equal_batches, "../../x", "/tmp/y", f"{cifar10.FOLDER}/readme.html")
    expect(monkeypatch, body)
    with Server(body) as url:
        folder = download_from(monkeypatch, url, tmp_path / "a" / "b")
    assert files(tmp_path / "a") == sorted(f"b/{cifar10.FOLDER}/{name}" for name in BATCHES)
    for name in BATCHES:
        assert (folder / name).read_bytes() == (equal_batches / name).read_bytes()
    assert not (tmp_path / "x").exists()
    message = capsys.readouterr().err
    assert str(tmp_path / "a" / "b") in message
    assert "MB" in message


def test_main_prints_the_folder(equal_batches, tmp_path, monkeypatch, capsys):
    body = archive(equal_batches)
    expect(monkeypatch, body)
    with Server(body) as url:
        monkeypatch.setenv("PEGASUS_CIFAR10_URL", url)
        download.main([str(tmp_path / "data")])
    assert capsys.readouterr().out == f"{tmp_path / 'data' / cifar10.FOLDER}\n"
    download.main([str(tmp_path / "data")])  # the server has gone, and is not needed
    assert capsys.readouterr().out == f"{tmp_path / 'data' / cifar10.FOLDER}\n"


def flip_bit(body: bytes, index: int) -> bytes:
    return body[:index] + bytes([body[index] ^ 1]) + body[index + 1 :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda body: b"<!DOCTYPE html><html>a portal</html>",
            ["36 bytes", "<!DOCTYPE ht", "wanted 170,052,171"],
        ),
        (lambda body: b"", ["got 0 bytes"]),
        (lambda body: body + b"x", ["got more than"]),
        (lambda body: flip_bit(body, 100), ["SHA-256", "nothing was kept"]),
    ],
)
def test_downloads_of_other_bytes(equal_batches, tmp_path, monkeypatch, change, words):
    body = archive(equal_batches)
    sent = change(body)
    expect(monkeypatch, body, 170_052_171 if len(sent) < 100 else len(body))
    with Server(sent) as url, pytest.raises(UserError) as fault:
        download_from(monkeypatch, url, tmp_path / "data")
    assert all(word in str(fault.value) for word in words), fault.value
    assert "yourself" in str(fault.value)
    assert not isinstance(fault.value, download.Unreachable)
    assert files(tmp_path / "data") == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_behind(equal_batches, tmp_path, monkeypatch, name):
    signum = getattr(signal, name)
    signal.signal(signum, signal.SIG_DFL)
    monkeypatch.setattr(download, "check_archive", lambda *_: signal.raise_signal(signum))
    body = archive(equal_batches)
    expect(monkeypatch, body)
    parent = tmp_path / "data"
    with Server(body) as url, pytest.raises(SystemExit) as left:
        cli.run(lambda: download_from(monkeypatch, url, parent))
    assert left.value.code == 128 + signum
    assert files(parent) == []


def test_a_download_that_never_ends_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SIZE", 2000)
    monkeypatch.setattr(download, "CHUNK", 500)
    with Server(bytes(50_000)) as url, open(tmp_path / "file", "wb") as file:
        assert download.fetch(url, file, timeout=8.0) == 2500


def test_archives_without_the_batches(tmp_path, monkeypatch, equal_batches):
    def fault(body):
        expect(monkeypatch, body)
        with Server(body) as url, pytest.raises(UserError) as caught:
            download_from(monkeypatch, url, tmp_path / "data")
        assert files(tmp_path / "data") == []
        return str(caught.value)

    assert "not CIFAR-10's archive" in fault(b"\x1f\x8b not gzip after all")
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../x"), io.BytesIO())
    assert "data_batch_1.bin" in fault(other.getvalue())
    (equal_batches / "data_batch_2.bin").write_bytes(b"short")
    assert "data_batch_2.bin is not a file of" in fault(archive(equal_batches))


def test_a_download_that_breaks_off_is_no_reason_to_draw(
    equal_batches, tmp_path, monkeypatch, complaint
):
    body = archive(equal_batches)
    expect(monkeypatch, body)
    monkeypatch.chdir(tmp_path)
    broken = Server(body[:50], promised=len(body))
    for server in (broken, Server(b"", 404), Server(b"", 503)):
        with server as url:
            monkeypatch.setenv("PEGASUS_CIFAR10_URL", url)
            assert url in complaint(lambda argv: datasets.load(*argv), "auto", "horse,bird")
    assert not (tmp_path / "data" / "synthetic").exists()


def reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that reads a request and leaves the rest to `answer`."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

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
    yield f"http://127.0.0.1:{port}/{ARCHIVE}"
    over.set()
    socket.create_connection(("127.0.0.1", port)).close()
    thread.join(10)
    listening.close()


def send(*parts: bytes) -> Callable:
    return lambda connection: connection.sendall(b"".join(parts))


def part(promised: str, then: Callable = lambda connection: None) -> Callable:
    """Send a head that promises so many bytes, 5,000 bytes, and then do something."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {promised}\r\n\r\n"

    def answer(connection: socket.socket) -> None:
        connection.sendall(head.encode() + b"x" * 5000)
        then(connection)

    return answer


def redirect(location: str) -> Callable:
    return send(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\n\r\n".encode())


def stall(connection: socket.socket) -> None:
    time.sleep(0.5)


OK = b"HTTP/1.1 200 OK\r\n"
ANSWERS = {
    "stalls at once": (stall, "can't be reached (timed out)"),
    "stalls half way": (part("9000", stall), "broke off (timed out)"),
    "resets at once": (reset, "can't be reached"),
    "resets half way": (part("99999999", reset), "broke off"),
    "promises more": (part("9000"), "got 5,000 bytes"),
    "promises less": (part("3000"), "got 3,000 bytes"),
    "promises nonsense": (part("-many"), "got 5,000 bytes"),
    "chunks of nonsense": (send(OK, b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "broke off"),
    "no HTTP": (send(b"\x00" * 3000), "can't be reached"),
    "an endless head": (send(OK, b"a: b\r\n" * 999), "can't be reached"),
    "sends elsewhere: a file": (redirect("file:///etc/passwd"), "answered 302"),
    "sends elsewhere: itself": (redirect(f"/{ARCHIVE}"), "answered 302"),
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_servers_that_fail(tmp_path, monkeypatch, fault):
    answer, words = ANSWERS[fault]
    timeout = 0.2 if "stalls" in fault else 8.0
    with raw_server(answer) as url, pytest.raises(UserError) as caught:
        download_from(monkeypatch, url, tmp_path / "data", timeout=timeout)
    assert words in str(caught.value)
    assert isinstance(caught.value, download.Unreachable) == ("can't be reached" in words)
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "data") == []


def test_a_redirect_is_held_to_the_digest(equal_batches, tmp_path, monkeypatch):
    """Wherever the bytes come from, they are CIFAR-10's or none."""
    body = archive(equal_batches)
    expect(monkeypatch, body)
    with Server(body) as elsewhere, raw_server(redirect(elsewhere)) as url:
        download_from(monkeypatch, url, tmp_path / "good")
    assert len(files(tmp_path / "good")) == 6
    changed = flip_bit(body, len(body) - 1)
    with Server(changed) as elsewhere, raw_server(redirect(elsewhere)) as url:
        with pytest.raises(UserError, match="SHA-256"):
            download_from(monkeypatch, url, tmp_path / "bad")
    assert files(tmp_path / "bad") == []


@pytest.mark.parametrize(
    "url", ["nonsense", "http://", "http://[", "http://127.0.0.1:99999/", "gopher://x/y"]
)
def test_addresses_that_are_none(tmp_path, monkeypatch, url):
    with pytest.raises(download.Unreachable, match="can't be reached"):
        download_from(monkeypatch, url, tmp_path)
