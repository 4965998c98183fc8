"""Pictures that people have: what is read of one, and of folders of them."""
import io
import shutil
import struct
from pathlib import Path

import sample
import train
from pegasus import checkpoint
from pegasus.cli import UserError
from pegasus.data import cifar10, datasets, pictures
from pegasus.data.classes import is_name
from pegasus.models import composites

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps


def test_what_is_transparent_is_read_as_white(tmp_path):
    cut = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    cut.paste((200, 30, 40, 255), (10, 0, 20, 20))
    images = {"rgba": cut, "palette": cut.quantize(), "grey": cut.convert("LA")}
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        pixels = pictures.read(tmp_path / f"{name}.png").float()
        assert (pixels[:, 0, 31] > 242).all(), name
        assert pixels[:, 0, 8].mean() < 128, name


def test_a_large_picture_gives_no_warning(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    Image.new("1", (50, 40)).save(tmp_path / "large.png")
    assert pictures.read(tmp_path / "large.png").shape == (3, 32, 32)
    assert not recwarn.list


def exif(orientation: int) -> bytes:
    """EXIF data with an orientation, and a resolution of -1/0."""
    header = b"Exif\0\0MM\0*" + struct.pack(">I", 8)
    entries = struct.pack(">HHHIHH", 2, 0x0112, 3, 1, orientation, 0)
    entries += struct.pack(">HHII", 0x011A, 10, 1, 38)
    return header + entries + struct.pack(">Iii", 0, -1, 0)


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_exif_says(tmp_path, orientation):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:20, :40] = 255
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png", exif=exif(orientation))
    plain = Image.Exif()
    plain[0x0112] = orientation
    image.save(tmp_path / "b.png", exif=plain)
    with Image.open(tmp_path / "b.png") as plain_image:
        ImageOps.exif_transpose(plain_image).save(tmp_path / "c.png")
    assert pictures.read(tmp_path / "a.png").equal(pictures.read(tmp_path / "c.png"))


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    image = Image.new("RGB", (64, 64), "white")
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert pictures.read(tmp_path / "a.jpg").min() == 255


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_whose_white_is_unknown_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((40, 40), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="a.tiff: .*its pixels have 32 bits; save it with"):
        pictures.read(tmp_path / "a.tiff")


def test_a_picture_of_too_many_pixels_is_told(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="a.png: wanted at most 2,000 pixels"):
        pictures.read(tmp_path / "a.png")


def test_sixteen_bits_a_pixel_are_read_as_bright_as_they_are(tmp_path):
    pixels = np.full((40, 50), 30_000, np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    assert pictures.read(tmp_path / "deep.png").unique().tolist() == [117]


# ---- folders ----


SUFFIXES = ("jpg", "png", "webp", "gif", "bmp", "tiff")
MODES = {  # that a format can hold
    "jpg": ("RGB", "L", "CMYK"), "png": ("RGB", "L", "P", "RGBA", "LA"), "webp": ("RGB", "RGBA"),
    "gif": ("P",), "bmp": ("RGB", "L"), "tiff": ("RGB", "CMYK", "L", "RGBA"),
}


def save_any(pixels: np.ndarray, path: Path, number: int) -> None:
    """Write a picture in one of many formats, modes and sizes."""
    side = 36 + 5 * (number % 7)
    square = Image.fromarray(pixels.transpose(1, 2, 0)).resize((side, side))
    image = Image.new("RGB", (side + 20 * (number % 3), side), "red")
    image.paste(square, (10 * (number % 3), 0))
    suffix = SUFFIXES[number % len(SUFFIXES)]
    mode = MODES[suffix][number // len(SUFFIXES) % len(MODES[suffix])]
    image.convert(mode).save(path / f"{number:03}.{suffix}")


@pytest.fixture(scope="module")
def photos(batches, tmp_path_factory) -> Path:
    """Folders "tabby" and "whippet" with 30 pictures each, two of them broken."""
    folder = tmp_path_factory.mktemp("photos") / "pets"
    images, labels = cifar10.load_all(batches, cifar10.TRAIN)
    for label, name in ((2, "tabby"), (7, "whippet")):
        place = folder / name / "more"
        place.mkdir(parents=True)
        for number, image in enumerate(images[labels == label][:30]):
            save_any(image.numpy(), place, number)
        (place / "broken.jpg").write_bytes((place / "000.jpg").read_bytes()[:200])
        (place / ".hidden").write_text("no picture, and nobody is told")
    return folder


@pytest.fixture
def own_photos(photos, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(photos, tmp_path / "own"))


def counts(data: datasets.Dataset) -> tuple[list[int], list[int]]:
    return data.labels.bincount().tolist(), data.test_labels.bincount().tolist()


def test_folders_are_classes_and_a_tenth_is_kept_to_test(own_photos, capsys):
    data = datasets.load(str(own_photos), None)
    assert data.classes == ("tabby", "whippet")
    assert counts(data) == ([27, 27], [3, 3])
    assert data.images.shape == (54, 3, 32, 32)
    said = capsys.readouterr().err
    assert "2 of 62 files" in said
    assert f"{own_photos}/tabby/more/broken.jpg: not a picture that can be read" in said
    other = datasets.load(str(own_photos), "whippet,tabby")
    assert other.images[other.labels == 1].equal(data.images[data.labels == 0])
    assert "2 of 62 files" in capsys.readouterr().err  # of what was kept, too


def test_pictures_look_as_they_did(own_photos, batches):
    images, labels = cifar10.load_all(batches, cifar10.TRAIN)
    data = datasets.load(str(own_photos), "whippet")
    wanted = composites.luminance(images[labels == 7][:30].float())  # some are grey now
    for image in composites.luminance(torch.cat([data.images, data.test_images]).float()):
        assert (wanted - image).abs().mean((1, 2, 3)).min() < 8


def test_what_was_read_is_kept_until_a_file_changes(own_photos, monkeypatch, capsys):
    data = datasets.load(str(own_photos), None)
    read = pictures.read
    monkeypatch.setattr(pictures, "read", lambda *_: pytest.fail("read again"))
    assert datasets.load(str(own_photos), None).digest == data.digest
    monkeypatch.setattr(pictures, "read", read)
    moved = own_photos.rename(own_photos.parent / "moved")
    monkeypatch.setattr(pictures, "read", lambda *_: pytest.fail("read again"))
    assert datasets.load(str(moved), None).digest == data.digest
    monkeypatch.setattr(pictures, "read", read)
    Image.new("RGB", (40, 40), "red").save(moved / "tabby" / "more" / "001.png")
    assert datasets.load(str(moved), None).digest != data.digest
    (moved / "tabby" / "more" / "002.webp").unlink()
    assert sum(map(sum, counts(datasets.load(str(moved), None)))) == 59


def test_kept_pixels_that_are_damaged_are_read_again(own_photos):
    """Cut short, or with a bit changed in a header, a name, a shape or a pixel."""
    data = datasets.load(str(own_photos), "tabby")
    cache = own_photos / pictures.CACHE.format(size=32)
    whole = cache.read_bytes()
    key = str(np.load(io.BytesIO(whole))["key"])
    whole_pictures = pictures.load_cache(cache, key)
    assert len(whole_pictures.images) == 30
    places = [*range(0, 300, 7), 5000, *range(len(whole) - 300, len(whole), 7)]
    damaged = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in places]
    for content in (b"", whole[:-1], whole[: len(whole) // 2], *damaged):
        cache.write_bytes(content)
        kept = pictures.load_cache(cache, key)
        assert kept is None or (kept.images == whole_pictures.images).all()
    cache.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
    assert datasets.load(str(own_photos), "tabby").digest == data.digest


def test_a_folder_that_cannot_be_written_is_read_each_time(own_photos, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pictures.files.os, "replace", refuse)
    assert counts(datasets.load(str(own_photos), None)) == ([27, 27], [3, 3])
    said = capsys.readouterr().err
    assert "can't be written (Permission denied); its pictures are read again" in said


def test_a_file_that_cannot_be_read_is_not_taken_for_no_picture(own_photos, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pictures.Image, "open", refuse)
    with pytest.raises(UserError, match=r"can't be read \(Permission denied\)"):
        datasets.load(str(own_photos), None)


def test_links_are_no_way_around_in_circles(own_photos):
    (own_photos / "tabby" / "again").symlink_to(own_photos / "tabby")
    (own_photos / "tabby" / "nowhere.jpg").symlink_to("gone.jpg")
    assert counts(datasets.load(str(own_photos), None)) == ([27, 27], [3, 3])


def test_names_that_would_move_a_terminals_cursor(own_photos, capsys):
    (own_photos / "tabby" / "\033[2J\nb.jpg").write_text("no picture")
    assert sum(counts(datasets.load(str(own_photos), None))[0]) == 54
    said = capsys.readouterr().err
    assert "/tabby/?[2J?b.jpg: not a picture" in said


def test_a_word_is_no_folder(own_photos, monkeypatch, batches):
    monkeypatch.chdir(own_photos.parent)
    own_photos.rename("auto")
    monkeypatch.setenv("CIFAR10_DIR", str(batches))
    assert datasets.load("auto", None).classes == ("horse", "bird")


def test_train_and_test_are_taken_as_they_are(photos, tmp_path):
    for part, first in (("train", 0), ("test", 20)):
        for name in ("tabby", "whippet"):
            place = tmp_path / "set" / part / name
            place.mkdir(parents=True)
            for path in sorted((photos / name / "more").glob("[0-9]*"))[first : first + 8]:
                shutil.copy(path, place)
    data = datasets.load(str(tmp_path / "set"), None)
    assert counts(data) == ([8, 8], [8, 8])


def load(argv: list[str]) -> None:
    """A command line for `complaint`: --data and, perhaps, --classes."""
    datasets.load(argv[0], argv[1] if len(argv) > 1 else None)


def test_what_is_no_folder_of_pictures_is_told(own_photos, tmp_path, complaint):
    assert "wanted one or more different ones of tabby, whippet" in complaint(
        load, own_photos, "tabby,cat"
    )
    for path in (own_photos / "whippet" / "more").iterdir():
        path.unlink()
    assert "no picture of whippet to train on" in complaint(load, own_photos)
    for path in (own_photos / "tabby" / "more").iterdir():
        path.write_text("no picture")
    assert "31 of 31 files are no pictures, as " in complaint(load, own_photos)
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    assert "no file in its folders" in complaint(load, tmp_path / "empty")


@pytest.mark.parametrize("name", ["pegasus", "white cats", "a,b", "walk", "val"])
def test_a_folder_that_no_class_can_be(tmp_path, complaint, name):
    (tmp_path / "set" / name).mkdir(parents=True)
    assert "this can't be a class's name; rename" in complaint(load, tmp_path / "set")


@pytest.mark.parametrize("name", ["", " a", "a\n", "morph", "dark x", None, 3, "a,b"])
def test_names_that_no_class_has(name):
    assert not is_name(name)


def test_names_that_a_class_has():
    assert all(map(is_name, ("dark_horse", "großes Pferd", "chien-loup")))


def test_a_list_of_classes_may_hold_blanks(own_photos, tmp_path, small_network):
    arguments = ["--data", str(own_photos), "--run", str(tmp_path / "run"), "--threads", "1"]
    arguments += ["--arch", "mlp", "--classes", "whippet, tabby", "--resume"]
    assert train.main([*arguments, "--epochs", "1"]) == 0
    assert train.main([*arguments, "--epochs", "2"]) == 0


def test_a_run_of_pictures_that_no_judge_knows(small_network, own_photos, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--data", str(own_photos), "--run", str(run), "--threads", "1"]
    assert train.main([*arguments, "--epochs", "2", "--batch-size", "32"]) == 0
    said = capsys.readouterr()
    assert "54 pictures (tabby, whippet) from own" in said.out
    assert "judge 0 does not know tabby" in said.err
    assert checkpoint.load(run / "last.pt")["config"]["classes"] == "tabby,whippet"
    out = tmp_path / "out.png"
    for mode in ("pegasus", "tabby", "morph"):
        sample.main([str(run / "last.pt"), str(out), "--mode", mode, "--steps", "2"])
    sample.main([str(run / "last.pt"), str(out), "--steps", "2", "--best", "4"])


def test_a_run_notices_that_a_picture_has_changed(
    small_network, own_photos, tmp_path, complaint
):
    arguments = ["--data", str(own_photos), "--run", str(tmp_path / "run"), "--threads", "1"]
    assert train.main([*arguments, "--epochs", "1", "--arch", "mlp"]) == 0
    Image.new("RGB", (40, 40), "red").save(own_photos / "tabby" / "more" / "001.png")
    said = complaint(train.main, *arguments, "--resume", "--epochs", 2)
    assert "is not what the checkpoint was trained on" in said
