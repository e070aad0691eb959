"""Bad images, folders and flags: each works, or ends in one line that names the file.

Then the exit status is 2 and nothing is written.

The table at the end of the first half is a row of docs/GUARANTEES.md, case by case.
"""

import ctypes
import os
import pwd
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, in_process, run_cli
from PIL import Image, ImageCms
from torchvision import transforms

from utils import cli
import Tester
import Trainer
from dataloader import Dataset_Dance, list_test_sequences
from utils.frame_cache import read_image

SIZES = [
    "--frame_H", "8", "--frame_W", "16", "--F_dim", "8", "--L_dim", "2", "--N_dim", "4",
    "--D_out_dim", "8", "--device", "cpu", "--precision", "fp32", "--val_vi_len", "4",
    "--num_epoch", "1", "--num_workers", "0", "--kl_anneal_cycle", "1"
]
# pytest undoes our own filter
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX file system")


# ---------------------------------------------------------------- a data set to break


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """8 training frames, 4 to validate, 2 test sequences of 4 poses; 20x10 pixels."""
    root, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    counts = {
        "train/train_img": 8, "train/train_label": 8, "val/val_img": 4, "val/val_label": 4,
        "test/test_img/0": 1, "test/test_img/1": 1, "test/test_label/0": 4, "test/test_label/1": 4
    }
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(
                root / folder / f"{i}.png"
            )
    return root


@pytest.fixture
def data(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "data"))


@pytest.fixture(scope="module")
def trained(whole, tmp_path_factory):
    """A checkpoint of the sizes above."""
    folder = tmp_path_factory.mktemp("trained")
    Trainer.main(["--DR", str(whole), "--save_root", str(folder), *SIZES, "--no_cache"])
    return folder / "best.ckpt"


def command(main, *argv):
    """Exit status of main(argv), run as the command line runs it."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(word) for word in argv]))
    return stop.value.code


def assert_refused(status, stderr, named, *absent):
    """Exit status 2, one line that holds `named`, and none of the paths `absent` made."""
    assert status == 2, stderr
    assert stderr.count("\n") == 1 and named in stderr and "Traceback" not in stderr, stderr
    for path in absent:
        assert not Path(path).exists(), f"{path} was made"


# ---------------------------------------------------------------- images that Pillow cannot write


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width, height, depth, colour, content, interlaced=0, idat=slice(None)):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    data = zlib.compress(content)[idat]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )


def scanlines(pixels):
    """Rows of bytes, each after the byte that says it is not filtered."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)


PIXELS = np.random.default_rng(1).integers(0, 256, (10, 20, 3), dtype=np.uint8)
ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2)
)
INTERLACED = png(
    20, 10, 8, 2, b"".join(scanlines(PIXELS[y::dy, x::dx]) for x, y, dx, dy in ADAM7), 1
)
GREY = PIXELS[:, :, :1].repeat(3, 2)
GREY16 = (PIXELS[:, :, 0].astype(np.uint16) * 257).astype(">u2")
BLACK_WHITE = np.where(PIXELS[:, :, :1] < 128, 0, 255).repeat(3, 2).astype(np.uint8)
# 200 pixels have at most 200 colours: nothing is lost
PALETTE = Image.fromarray(PIXELS).quantize(256)


def saved(image, **options):
    """Return a function that writes the image over a file."""
    return lambda path: image.save(path, **options)


def content(content):
    return lambda path: path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])


def replaced_by(make):
    def change(path):
        path.unlink()
        make(path)

    return change


# an image of the training set is overwritten: what it must read as
READABLE = {
    "RGB": (saved(Image.fromarray(PIXELS)), PIXELS),
    "palette": (saved(PALETTE), PIXELS),
    "palette with a transparent colour": (saved(PALETTE, transparency=0), PIXELS),
    "grey": (saved(Image.fromarray(PIXELS[:, :, 0])), GREY),
    "grey with alpha": (saved(Image.fromarray(PIXELS[:, :, 0]).convert("LA")), GREY),
    "alpha": (saved(Image.fromarray(np.dstack([PIXELS, PIXELS[:, :, 0]]))), PIXELS),
    "16-bit grey": (content(png(20, 10, 16, 0, scanlines(GREY16))), GREY),
    "16-bit colour": (
        content(png(20, 10, 16, 2, scanlines((PIXELS.astype(np.uint16) * 257).astype(">u2")))),
        PIXELS,
    ),
    "1-bit": (
        saved(Image.fromarray(BLACK_WHITE).convert("1", dither=Image.Dither.NONE)), BLACK_WHITE
    ),
    "interlaced": (content(INTERLACED), PIXELS),
    "a JPEG under the name of a PNG": (
        saved(Image.new("RGB", (20, 10), (90, 90, 90)), format="JPEG"), np.full((10, 20, 3), 90)
    ),
    "CMYK JPEG": (
        saved(Image.new("CMYK", (20, 10), (0, 0, 0, 155)), format="JPEG", quality=100),
        np.full((10, 20, 3), 100),
    ),
    "one pixel": (saved(Image.new("RGB", (1, 1), (1, 2, 3))), np.array([[[1, 2, 3]]])),
}

# an image of the training set is overwritten: it can't be read, and is named
UNREADABLE = {
    "truncated": cut,
    "zero-byte": content(b""),
    "not a PNG": content(b"this is no image"),
    "claims 100000x100000": content(png(100_000, 100_000, 8, 2, b"\0" * 100)),
    "claims 12000x10000": content(png(12_000, 10_000, 8, 2, b"\0" * 100)),
    "claims 0x0": content(png(0, 0, 8, 2, b"")),
    "half of its data with a good checksum": content(
        png(20, 10, 8, 2, scanlines(PIXELS), idat=slice(0, 200))
    ),
    "a damaged checksum": content(png(20, 10, 8, 2, scanlines(PIXELS)).replace(b"IDAT", b"IDAX")),
    "a link that points nowhere": replaced_by(lambda path: path.symlink_to("nowhere.png")),
    "a link to itself": replaced_by(lambda path: path.symlink_to(path.name)),
    "a folder named like an image": replaced_by(Path.mkdir),
    "a pipe": replaced_by(lambda path: os.mkfifo(path)),
}


def tiff(pixels, photometric, bits):
    """The bytes of a little-endian TIFF of one channel that Pillow can't write."""
    content = pixels.tobytes()
    tags = [
        (256, 20), (257, 10), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
        (278, 10), (279, len(content))
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(content))
    return head + content + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def packed_12_bits(values):
    """Pairs of 12-bit values in three bytes."""
    a, b = values.reshape(-1, 2).T.astype(int)
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8)


LONG_TEXT = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 2_000_000))
BROKEN_TEXT = chunk(b"tEXt", b"Comment\0x")[:-1] + b"?"
PLAIN = png(20, 10, 8, 2, scanlines(PIXELS))
SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
SIXTEEN = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)
RED = Image.new("RGB", (20, 10), (200, 30, 40))
# every mode that Pillow has: how a file comes to it, and what it must read as (None: it is refused)
MODES = {
    "1": (saved(Image.fromarray(BLACK_WHITE).convert("1"), format="TIFF"), BLACK_WHITE),
    "L": (saved(Image.fromarray(PIXELS[:, :, 0]), format="BMP"), GREY),
    "LA": (saved(Image.fromarray(PIXELS[:, :, 0]).convert("LA"), format="TIFF"), GREY),
    "P": (saved(PALETTE, format="TIFF"), PIXELS),
    "PA": (saved(PALETTE.convert("PA"), format="TIFF"), PIXELS),
    "RGB": (saved(Image.fromarray(PIXELS), format="WEBP", lossless=True), PIXELS),
    "RGBA": (saved(Image.fromarray(PIXELS).convert("RGBA"), format="TIFF"), PIXELS),
    "RGBX": (saved(Image.fromarray(PIXELS).convert("RGBX"), format="TIFF"), PIXELS),
    "CMYK": (saved(RED.convert("CMYK"), format="TIFF"), np.asarray(RED)),
    "YCbCr": (saved(RED.convert("YCbCr"), format="TIFF"), np.asarray(RED)),
    "LAB": (
        saved(ImageCms.profileToProfile(RED, SRGB, LAB, outputMode="LAB"), format="TIFF"),
        np.asarray(RED),
    ),
    "I;16": (saved(SIXTEEN), GREY),
    "I;16B": (saved(SIXTEEN.convert("I").convert("I;16B"), format="TIFF"), GREY),
    "I": (saved(Image.fromarray(PIXELS[:, :, 0].astype(np.int32)), format="TIFF"), None),
    "F": (saved(Image.fromarray(PIXELS[:, :, 0] / np.float32(255)), format="TIFF"), None),
    # never the mode of a file: Pillow can't write them, and no reader gives them
    "I;16L": None,
    "I;16N": None,
    "HSV": None,
    "La": None,
    "RGBa": None,
    # ranges within a mode
    "I;16 where white is zero": (content(tiff(65535 - GREY16.astype("<u2"), 0, 16)), GREY),
    "I;16 of 12 bits": (
        content(tiff(packed_12_bits(PIXELS[:, :, 0] // np.int16(16) * 273), 1, 12)),
        PIXELS[:, :, :1].repeat(3, 2) // 16 * 17,
    ),
    "text beyond Pillow's limit": (content(PLAIN[:33] + LONG_TEXT + PLAIN[33:]), PIXELS),
    "text at the end": (content(PLAIN[:-12] + LONG_TEXT + PLAIN[-12:]), PIXELS),
    "text that is damaged": (content(PLAIN[:33] + BROKEN_TEXT + PLAIN[33:]), PIXELS),
}


@pytest.mark.parametrize("case", [case for case in MODES if MODES[case]])
def test_modes(tmp_path, case):
    write, pixels = MODES[case]
    path = tmp_path / "3.png"  # Pillow goes by the content
    write(path)
    if pixels is None:
        with pytest.raises(cli.UserError, match="3.png: holds .* expected .* 8 or 16 bits"):
            read_image(path)
    else:
        found = np.asarray(read_image(path), int)
        assert np.abs(found - pixels).max() <= (3 if case in ("LAB", "YCbCr") else 0)


def test_the_modes_are_all_that_pillow_has():
    assert set(Image.MODES) <= MODES.keys()


@pytest.mark.parametrize("case", READABLE)
def test_readable_images(data, case):
    write, pixels = READABLE[case]
    path = data / "train/train_img/3.png"
    write(path)
    assert np.abs(np.asarray(read_image(path), int) - pixels).max() <= (1 if "JPEG" in case else 0)
    imgs, _ = Dataset_Dance(
        data, transforms.Compose([transforms.Resize((10, 20)), transforms.ToTensor()]), "train", 8
    )[0]
    assert imgs.shape == (8, 3, 10, 20)
    assert torch.allclose(
        imgs[3].mean(), torch.tensor(pixels.mean() / 255, dtype=torch.float32), atol=0.01
    )


@posix
@pytest.mark.parametrize(
    "flags",
    [[], ["--no_cache"], ["--no_cache", "--recipe", "template", "--train_vi_len", "4"]],
    ids=" ".join,
)
@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_images(data, tmp_path, capfd, case, flags):
    UNREADABLE[case](data / "train/train_img/3.png")
    out = tmp_path / "out"
    status = command(Trainer.main, "--DR", data, "--save_root", out, *SIZES, *flags)
    lines = capfd.readouterr().err
    if "template" in flags:  # nothing is decoded before the epoch that needs it
        lines = "".join(line for line in lines.splitlines(True) if "|" not in line)
        assert not list(out.glob("*.c*"))
        assert_refused(status, lines, "3.png")
    else:
        assert_refused(status, lines, "3.png", out)
    assert not list(data.rglob("*.part"))


# ---------------------------------------------------------------- folders


def rename(change, *folders):
    """Rename every image of these folders: change(number) is the new name."""

    def apply(data):
        for folder in folders or ("train/train_img", "train/train_label"):
            for path in list((data / folder).iterdir()):
                path.rename(path.with_name(change(int(path.stem))))

    return apply


def both(name, new=None):
    """Remove or rename a training frame and its pose."""

    def apply(data):
        for folder in ("train/train_img", "train/train_label"):
            path = data / "train" / Path(folder).name / name
            path.rename(path.with_name(new)) if new else path.unlink()

    return apply


def on(path, action):
    """Do something to one path of the data set."""
    return lambda data: action(data / path)


def file_in_place(path):
    shutil.rmtree(path)
    path.write_text("a file")


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def duplicate(path):
    shutil.copy(path, path.with_name(f"frame{path.stem}.png"))


def add(*names):
    """Put files that are no images into the training folders."""

    def apply(data):
        for folder in ("train/train_img", "train/train_label"):
            for name in names:
                (data / folder / name).write_bytes(b"not an image")

    return apply


FINE = {
    "as it is": lambda data: None,
    "names like frame12.png": rename("frame{}.png".format),
    "names like 007.png": rename("{:03d}.png".format),
    "uppercase .PNG": rename("{}.PNG".format),
    "Unicode names": rename("képkocka №{} 帧.png".format),
    "digits of another script": rename(lambda i: f"{'٠١٢٣٤٥٦٧'[i]}.png"),
    "names that are not UTF-8": rename(lambda i: os.fsdecode(b"\xff%d.png" % i)),
    "names with spaces and newlines": rename(" a\nframe {} .png".format),
    "other names for poses": rename("pose{}.png".format, "train/train_label"),
    "numbers with gaps": rename(lambda i: f"{10 * i}.png"),
    "a frame and its pose both missing": both("4.png"),
    "hidden files": add(".DS_Store", "._3.png", ".3.png"),
    "other files": add("Thumbs.db", "notes 1.txt", "README"),
    "a folder beside the images": on("train/train_img/old", Path.mkdir),
    "a folder behind a link": on(
        "train",
        lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
    ),
    "an image behind a link": on(
        "train/train_img/3.png",
        lambda path: (path.rename(path.parents[2] / "3"), path.symlink_to(path.parents[2] / "3")),
    ),
}

# what is done to the data, flags, and what the one line must name
WRONG = {
    "a missing middle frame": (on("train/train_img/4.png", Path.unlink), [], "4.png"),
    "a missing pose": (on("train/train_label/4.png", Path.unlink), [], "4.png"),
    "one pose too many": (
        on("train/train_label/7.png", lambda path: shutil.copy(path, path.with_name("8.png"))),
        [], "8.png"
    ),
    "a missing frame to validate": (on("val/val_img/2.png", Path.unlink), [], "2.png"),
    "duplicate numbers": (on("train/train_img/1.png", duplicate), [], "frame1.png"),
    "duplicate numbers with zeros": (
        on("val/val_label/1.png", lambda path: shutil.copy(path, path.with_name("01.png"))),
        [], "01.png"
    ),
    "a name without an integer": (
        on("train/train_img/4.png", lambda path: path.rename(path.with_name("four.png"))),
        [], "four.png"
    ),
    "a name with two integers": (
        on("train/train_img/4.png", lambda path: path.rename(path.with_name("4 of 8.png"))),
        [], "4 of 8.png"
    ),
    "no data folder": (shutil.rmtree, [], "val_img"),
    "a file for the data folder": (file_in_place, [], "val_img"),
    "an empty data folder": (emptied, [], "val_img"),
    "no train folder": (on("train", shutil.rmtree), [], "train_img"),
    "no val folder": (on("val", shutil.rmtree), [], "val_img"),
    "no pose folder": (on("train/train_label", shutil.rmtree), [], "train_label"),
    "an empty frame folder": (on("train/train_img", emptied), [], "train_img"),
    "an empty pose folder": (on("val/val_label", emptied), [], "val_label"),
    "a file in a folder's place": (on("train/train_img", file_in_place), [], "train_img"),
    "only other files": (
        on("val/val_img", lambda path: (emptied(path), (path / "1.txt").touch())),
        [], "val_img"
    ),
    "a link to a folder that points nowhere": (
        on("val", lambda path: (shutil.rmtree(path), path.symlink_to("nowhere"))),
        [], "val_img"
    ),
    "validation shorter than val_vi_len": (lambda data: None, ["--val_vi_len", "5"], "val_img"),
    "too few frames for one window": (lambda data: None, ["--train_vi_len", "9"], "train_img"),
    "too few frames for one window of the template": (
        lambda data: None, ["--recipe", "template"], "train_img"
    ),
    "too small a share for one window": (
        lambda data: None,
        ["--recipe", "template", "--train_vi_len", "4", "--partial", "0.3"], "train_img"
    ),
    "too small a first share": (
        lambda data: None,
        [
            "--recipe", "template", "--train_vi_len", "4", "--batch_size", "1", "--fast_train",
            "--fast_partial", "0.3"
        ],
        "train_img",
    ),
    "too few windows for a batch": (
        lambda data: None,
        ["--recipe", "template", "--train_vi_len", "4", "--batch_size", "3"], "--batch_size"
    ),
    "a batch larger than the pool": (
        lambda data: None, ["--batch_size", "5", "--pool", "4"], "--batch_size"
    ),
}


@posix
@pytest.mark.parametrize("case", FINE)
def test_fine_folders(data, whole, case):
    FINE[case](data)
    plain = transforms.ToTensor()
    imgs, labels = Dataset_Dance(data, plain, "train", 7)[0]
    index = [i for i in range(8) if i != 4][:7] if "both missing" in case else range(7)
    expected = Dataset_Dance(whole, plain, "train", 8)[0]
    assert torch.equal(imgs, expected[0][list(index)])
    assert torch.equal(labels, expected[1][list(index)])


@posix
def test_all_that_is_fine_at_once_trains(data, tmp_path):
    for case in (
        "names that are not UTF-8", "hidden files", "other files", "a folder behind a link"
    ):
        FINE[case](data)
    assert command(Trainer.main, "--DR", data, "--save_root", tmp_path / "out", *SIZES) == 0
    assert (tmp_path / "out" / "best.ckpt").exists()


@posix
@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders(data, tmp_path, capfd, case):
    damage, flags, named = WRONG[case]
    damage(data)
    before = sorted(data.rglob("*")) if data.is_dir() else data.exists()
    out = tmp_path / "out"
    status = command(Trainer.main, "--DR", data, "--save_root", out, *SIZES, *flags)
    assert_refused(status, capfd.readouterr().err, named, out)
    # no cache is made for data that is wrong
    assert before == (sorted(data.rglob("*")) if data.is_dir() else data.exists())


@pytest.mark.parametrize("flags", [["--no_cache"], []], ids=["no_cache", "cache"])
@pytest.mark.parametrize(
    "case", ["no data folder", "a missing frame to validate", "validation shorter than val_vi_len"]
)
def test_wrong_folders_when_validating(data, trained, tmp_path, capfd, case, flags):
    damage, more, named = WRONG[case]
    damage(data)
    status = command(
        Trainer.main, "--DR", data, "--save_root", tmp_path / "out", "--ckpt_path", trained,
        "--test", *more, *flags
    )
    assert_refused(status, capfd.readouterr().err, named, tmp_path / "out")


def sequences(*names):
    """Give the test sequences 0, 1, ... these names, None for none."""

    def apply(data):
        for kind in ("test_img", "test_label"):
            root = (data / "test" / kind).rename(data / "test" / "old")
            for i, name in enumerate(names):
                if name:
                    shutil.copytree(root / str(i % 2), data / "test" / kind / name)
            shutil.rmtree(root)

    return apply


@pytest.mark.parametrize("names", [("1", "2"), ("09", "10"), ("007", "8")])
def test_sequences_with_any_consecutive_numbers(data, whole, names):
    sequences(*names)(data)
    for (first, poses), (_, expected) in zip(
        list_test_sequences(data), list_test_sequences(whole), strict=True
    ):
        assert [p.read_bytes() for p in poses] == [p.read_bytes() for p in expected]
        assert first.parent.name == poses[0].parent.name == names[int(expected[0].parent.name)]


@pytest.mark.parametrize("below", ["train", "train/train_img", "", "unpacked", "unpacked/again"])
def test_a_data_folder_that_is_one_off(data, trained, tmp_path, capfd, below):
    if below in ("train", "train/train_img"):
        given = data / below
    else:  # an archive that unpacks into folders of its own
        given = tmp_path / "given"
        new = given / (below or "data")
        new.parent.mkdir(parents=True)
        data = data.rename(new)
    flags = ["--DR", given, "--save_root", tmp_path / "out"]
    for main, more in ((Trainer.main, SIZES), (Tester.main, ["--ckpt_path", trained])):
        err = (command(main, *flags, *more), capfd.readouterr().err)
        assert_refused(*err, f"which is {data}\n", tmp_path / "out")
        assert f"--DR {given}: " in err[1] and err[1].count("\n") == 1


TEST_WRONG = {
    "a gap in the sequences": (sequences("0", None, "2"), "test_img/1"),
    "one number twice": (sequences("0", "00"), "test_img/00"),
    "a pose too few": (on("test/test_label/1/3.png", Path.unlink), "test_label/1"),
    "a pose too many": (
        on("test/test_label/0/3.png", lambda path: shutil.copy(path, path.with_name("4.png"))),
        "test_label/0",
    ),
    "two first frames": (
        on("test/test_img/1/0.png", lambda path: shutil.copy(path, path.with_name("1.png"))),
        "test_img/1",
    ),
    "no first frame": (on("test/test_img/1/0.png", Path.unlink), "test_img/1"),
    "a sequence without first frame": (on("test/test_img/1", shutil.rmtree), "test_label/1"),
    "a sequence without poses": (on("test/test_label/1", shutil.rmtree), "test_label/1"),
    "no test folder": (on("test", shutil.rmtree), "test_img"),
    "no sequence": (on("test/test_img", emptied), "test_img"),
    "a broken pose": (on("test/test_label/1/2.png", cut), "2.png"),
    "a broken first frame": (on("test/test_img/0/0.png", content(b"")), "0.png"),
    "a pose with two numbers": (
        on("test/test_label/0/2.png", lambda path: path.rename(path.with_name("2-2.png"))),
        "2-2.png",
    ),
}


@pytest.mark.parametrize("case", TEST_WRONG)
def test_wrong_test_folders(data, trained, tmp_path, capfd, case):
    damage, named = TEST_WRONG[case]
    damage(data)
    out = tmp_path / "out"
    status = command(
        Tester.main, "--DR", data, "--save_root", out, "--ckpt_path", trained, "--device", "cpu",
        "--precision", "fp32"
    )
    assert_refused(status, capfd.readouterr().err, str(Path(named)), out)


# ---------------------------------------------------------------- folders to write to

WRITE_WRONG = {
    "save_root is a file": (["--save_root", "file"], "--save_root"),
    "save_root below a file": (["--save_root", "file/below/it"], "--save_root"),
    "save_root is a link that points nowhere": (["--save_root", "link"], "--save_root"),
    "save_root has too long a name": (["--save_root", "x" * 300], "--save_root"),
    "cache_dir is a file": (["--save_root", "out", "--cache_dir", "file"], "--cache_dir"),
    "cache_dir below a file": (["--save_root", "out", "--cache_dir", "file/below"], "--cache_dir"),
    "cache_dir has too long a name": (
        ["--save_root", "out", "--cache_dir", "x" * 300], "--cache_dir"
    ),
    "data folder has too long a name": (["--save_root", "out", "--DR", "x" * 300], "val_img"),
    "checkpoint has too long a name": (["--save_root", "out", "--ckpt_path", "x" * 300], "xxx"),
    "no save_root": ([], "--save_root"),
    "no data folder given": (["--save_root", "out", "--DR", ""], "--DR"),
}


@posix
@pytest.mark.parametrize("case", WRITE_WRONG)
def test_folders_that_cannot_be_written(whole, tmp_path, monkeypatch, capfd, case):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("keep me")
    Path("link").symlink_to("nowhere/at/all")
    flags, named = WRITE_WRONG[case]
    status = command(Trainer.main, "--DR", whole, *SIZES, *flags)
    assert_refused(status, capfd.readouterr().err, named)
    assert sorted(os.listdir()) == ["file", "link"] and Path("file").read_text() == "keep me"


def test_a_damaged_cache_is_made_anew(data, tmp_path):
    def flags(out):
        return [
            "--DR", data, "--save_root", tmp_path / out, *SIZES, "--cache_dir", tmp_path / "cache"
        ]

    assert command(Trainer.main, *flags("whole")) == 0
    caches = sorted((tmp_path / "cache").glob("*.npy"))
    contents = [path.read_bytes() for path in caches]
    assert len(caches) == 4
    damages = [b"", contents[1][:-1], b"PK\3\4" + contents[2], contents[0][:60] + b"\xff" * 100]
    for path, damage in zip(caches, damages):
        path.write_bytes(damage)
    assert command(Trainer.main, *flags("again")) == 0
    assert [path.read_bytes() for path in caches] == contents
    assert sorted((tmp_path / "cache").iterdir()) == caches


# ---------------------------------------------------------------- permissions, real commands


@pytest.fixture
def unprivileged():
    """Let permissions stop this thread and those it starts, where the tests run as root too."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    # sets[0]: effective, the first 32
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if not hasattr(libc, "capset") or libc.capget(header, sets):
        pytest.skip("runs as root and can't give that up here")
    before, sets[0] = sets[0], sets[0] & ~0b110  # without CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets):
        pytest.skip("runs as root and can't give that up here")
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


@pytest.fixture
def closing():
    """closing(path, mode): change permissions until the test is over."""
    closed = []
    yield lambda path, mode: (closed.append((path, path.stat().st_mode)), path.chmod(mode))
    for path, mode in reversed(closed):
        path.chmod(mode)


@posix
def test_read_only_data(data, tmp_path, closing, unprivileged, monkeypatch):
    closing(data, 0o555)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert command(Trainer.main, "--DR", data, "--save_root", tmp_path / "out", *SIZES) == 0
    assert len(list((tmp_path / "home" / ".cache" / "pose-conditioned-vae").glob("*.npy"))) == 4
    assert not (data / ".frame_cache").exists()

    closing(tmp_path / "home", 0o555)  # nowhere to keep the frames: they are decoded into memory
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "none"))
    assert command(Trainer.main, "--DR", data, "--save_root", tmp_path / "out2", *SIZES) == 0
    expected, found = (
        Path(tmp_path / out / "psnr_per_frame.csv").read_bytes() for out in ("out", "out2")
    )
    assert expected == found


@posix
def test_a_user_without_a_name(data, tmp_path, monkeypatch, capfd):
    """A container's user id that nobody has entered; data where nothing can be made."""
    (data / ".frame_cache").write_text("in the way")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.chdir(tmp_path)
    assert command(Trainer.main, "--DR", data, "--save_root", tmp_path / "out", *SIZES) == 0
    assert not (tmp_path / "~").exists()
    assert capfd.readouterr().out.count("frames are decoded into memory") == 1


@posix
def test_closed_folders(data, whole, tmp_path, closing, unprivileged, capfd):
    closed = tmp_path / "closed"
    closed.mkdir()
    closing(closed, 0o000)
    closing(data / "train" / "train_img", 0o000)
    cases = [
        (["--DR", data, "--save_root", tmp_path / "out"], "train_img"),
        (["--DR", closed, "--save_root", tmp_path / "out"], "closed"),
        (["--DR", whole, "--save_root", closed, "--no_cache"], "--save_root"),
        (["--DR", whole, "--save_root", closed / "below", "--no_cache"], "--save_root"),
        (["--DR", whole, "--save_root", tmp_path / "out", "--cache_dir", closed], "--cache_dir"),
        (
            ["--DR", whole, "--save_root", tmp_path / "out", "--ckpt_path", closed / "best.ckpt"],
            "best.ckpt",
        ),
    ]
    for flags, named in cases:
        assert_refused(
            command(Trainer.main, *flags, *SIZES), capfd.readouterr().err, named, tmp_path / "out"
        )


def test_the_commands_themselves(data, tmp_path):
    cut(data / "train/train_img/3.png")
    done = run_cli("Trainer.py", "--DR", data, "--save_root", tmp_path / "out", *SIZES)
    assert_refused(done.returncode, done.stderr, "3.png", tmp_path / "out")
    done = run_cli("Tester.py", "--ckpt_path", data / "train/train_img/3.png")
    assert_refused(done.returncode, done.stderr, "3.png", data / "train/train_img/test")


@posix
def test_folders_whose_names_are_not_utf8(whole, tmp_path):
    data, out = (tmp_path / os.fsdecode(name) for name in (b"d\xff\xe9\n", b"o\xff"))
    shutil.copytree(whole, data)
    done = run_cli(
        "Trainer.py", "--DR", data, "--save_root", out, *SIZES, env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    status = command(
        Tester.main, "--ckpt_path", out / "best.ckpt", "--device", "cpu", "--precision", "fp32"
    )
    assert status == 0
    assert (out / "test" / "submission.csv").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_more_than_the_memory_holds(error, whole, tmp_path, monkeypatch, capfd):
    def full(*args):
        raise error

    monkeypatch.setattr(Trainer.VAE_Model, "forward", full)
    status = command(
        Trainer.main, "--DR", whole, "--save_root", tmp_path / "out", *SIZES, "--no_cache"
    )
    assert status == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: --batch_size 4: ") and "--checkpoint_steps" in last


@pytest.mark.parametrize("main, sequences", [(Trainer.main, 1), (Tester.main, 2)])
def test_more_than_the_memory_holds_in_a_rollout(
    main, sequences, trained, tmp_path, monkeypatch, capfd
):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer.VAE_Model, "next_frame", full)
    out = tmp_path / "out"
    status = command(main, "--ckpt_path", trained, "--save_root", out, "--rollouts", "3", "--test")
    assert status == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: --rollouts 3, {sequences} sequence(s)")
    assert not list(out.glob("*"))


def test_a_gap_in_the_numbers_of_the_images_is_one_line(tiny_data, tmp_path, capsys):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for number in (7, 40):
        for kind in ("img", "label"):
            (data / "train" / f"train_{kind}" / f"{number}.png").unlink()
    flags = "--DR", data, "--save_root", tmp_path / "run", *TINY, "--num_epoch", 1
    assert in_process(Trainer.main, *flags) == 0
    out = capsys.readouterr().out
    assert out.count("train_img: lacks 2 of the numbers 0 to 63, the first 7") == 1
    assert out.count("lacks") == 1
