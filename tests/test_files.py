"""Files that are written whole or not at all."""
import os
import signal
import time

from pegasus import cli, files
from pegasus.files import replace_file

import pytest


def test_of_two_writers_the_last_wins_and_nothing_else_is_touched(tmp_path):
    path = tmp_path / "o.png"
    mine = tmp_path / "o.png.part"
    mine.write_text("mine")
    with replace_file(path) as first:
        with replace_file(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert mine.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.png", "o.png.part"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_permissions_stay(tmp_path, mode):
    path = tmp_path / "o.png"
    path.write_text("old")
    path.chmod(mode)
    with replace_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == mode


def test_long_names_have_room_for_a_temporary_one(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    with replace_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_half_written(tmp_path, name):
    signum = getattr(signal, name)
    signal.signal(signum, signal.SIG_DFL)

    def main() -> None:
        with replace_file(tmp_path / "o.png") as temporary:
            temporary.write_text("half")
            signal.raise_signal(signum)

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert left.value.code == 128 + signum
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept(tmp_path):
    old, new = (files.temporary_name(tmp_path / "last.pt") for _ in range(2))
    for path in (old, new, tmp_path / "mine.part"):
        path.write_text("half")
    an_hour_ago = time.time() - 3600
    for path in (old, tmp_path / "mine.part"):
        os.utime(path, (an_hour_ago, an_hour_ago))
    files.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {new.name, "mine.part"}
