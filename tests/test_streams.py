"""Standard streams that are closed, full, no terminal, or not in UTF-8."""
import errno
import io
import os
import subprocess
import sys

import train
from pegasus import checkpoint, streams
from pegasus.training import progress

import pytest
from conftest import ROOT, png

# streams.py alone: importing torch would take seconds
LIGHT = """
import os, signal, sys
sys.path.insert(0, "pegasus")
import streams
streams.prepare()
"""


def run_light(code: str, redirection: str = "", **env: str) -> subprocess.CompletedProcess:
    """Run some code after `streams.prepare()`, by a shell that redirects its streams."""
    command = f'exec "$0" -c "$1" {redirection}'
    arguments = ["sh", "-c", command, sys.executable, LIGHT + code]
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 60}
    return subprocess.run(arguments, env=os.environ | env, **settings)


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_lead_nowhere(closed, tmp_path):
    path = tmp_path / "file"
    done = run_light(
        f"with open({str(path)!r}, 'w') as file:\n"
        "    assert file.fileno() > 2\n"
        "    print(1)\n"
        "    print(2, file=sys.stderr)\n"
        "    os.write(2, b'of a library')\n"
        "    streams.show('line')\n"
        "sys.exit(7)",
        closed,
    )
    assert done.returncode == 7, done.stderr
    assert path.read_text() == ""


def test_a_picture_is_drawn_without_any_stream(tmp_path):
    command = 'exec "$0" sample.py pegasus.pt "$1" --n 1 --steps 1 0<&- 1>&- 2>&-'
    arguments = ["sh", "-c", command, sys.executable, tmp_path / "o.png"]
    env = os.environ | {"PEGASUS_EXTENSION": "0"}
    assert subprocess.run(arguments, cwd=ROOT, env=env).returncode == 0
    assert png(tmp_path / "o.png")[1]["steps"] == "1"


def test_any_character_can_be_printed():
    done = run_light("print('caf\\u00e9')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "caf\\xe9\n")


@pytest.mark.parametrize(
    ("place", "said"),
    [({"RANK": "1"}, "line\n"), ({"RANK": "1", "WORLD_SIZE": "2"}, "")],
)
def test_only_the_first_of_several_processes_says_something(place, said):
    assert run_light("streams.say('line')", **place).stderr == said


def test_what_stdout_does_not_take_is_told_and_stops_a_run():
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: print('saved', file=sys.stderr))\n"
        "streams.print_or_stop('line')\n"
        "print('and nothing more')"
    )
    done = run_light(code, "> /dev/full")
    assert done.returncode == 0
    words = "stdout: can't be written (No space left on device); saving, then stopping"
    assert done.stderr == f"{words}\nsaved\n"


class FullDisk(io.StringIO):
    """A stream that takes two lines, and then nothing until it leads nowhere."""

    failed = False

    def write(self, text: str) -> int:
        if self.getvalue().count("\n") >= 2 and not self.failed:
            self.failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)

    def fileno(self) -> int:
        return self.file.fileno()


def test_a_run_whose_output_fills_the_disk_saves_first(
    batches, tmp_path, monkeypatch, capsys
):
    stdout = FullDisk()
    monkeypatch.setattr(sys, "stdout", stdout)
    run = tmp_path / "run"
    arguments = ["--run", run, "--data", batches, "--arch", "mlp", "--epochs", 99]
    with open(os.devnull, "w") as stdout.file:
        assert train.main([str(argument) for argument in arguments]) == 143
    assert checkpoint.load(run / "last.pt")["epochs_done"] > 0
    words = "stdout: can't be written (No space left on device); saving, then stopping"
    assert words in capsys.readouterr().err


class Screen(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_dumb_terminal_gets_no_escapes(monkeypatch, tmp_path, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setattr(sys, "stderr", Screen())
    display = progress.Progress(1, 1, images=10, done=0, leads=True)
    display.end_epoch(1, {"loss": 1.0}, tmp_path / "speed.csv")
    streams.show("line")
    assert "epoch 1/1" in sys.stdout.getvalue()
    for stream in (sys.stdout, sys.stderr):
        assert ("\033" in stream.getvalue()) == (term == "xterm")
