"""From images to batches: order, windows, three modes, a bitwise identical cache, and cuts."""

import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2

import Trainer
from conftest import TINY
from dataloader import Dataset_Dance, Frames, WindowLoader, find_clips, frame_transform, list_pairs
from utils.frame_cache import cache_folder, to_float

COUNT = 23  # 12 comes before 2 in the alphabet


def shade(number):
    """An image that tells its number from every other's, as ToTensor gives it."""
    return number / 255


@pytest.fixture
def data(tmp_path):
    """Frames whose pixels are their number, poses 100 more.

    23 to train, 5 to validate, three test sequences of 6.
    """
    root = tmp_path / "data"

    def write(folder, numbers, add=0):
        (root / folder).mkdir(parents=True)
        for i in numbers:
            Image.new("RGB", (20, 10), (i + add,) * 3).save(root / folder / f"frame{i}.png")

    write("train/train_img", range(COUNT))
    write("train/train_label", range(COUNT), 100)
    write("val/val_img", range(5))
    write("val/val_label", range(5), 100)
    for sequence in (9, 10, 11):
        write(f"test/test_img/{sequence}", [sequence])
        write(f"test/test_label/{sequence}", range(6), 100)
    return root


def numbers(images, add=0):
    """The numbers of images (..., 3, H, W)."""
    assert torch.equal(images.amin((-3, -2, -1)), images.amax((-3, -2, -1)))
    return (images[..., 0, 0, 0] * 255).round().int().sub(add).tolist()


@pytest.fixture
def noise(tmp_path):
    """Random frames of a size that resizing mixes, so that equal tensors mean equal arithmetic."""
    rng = np.random.default_rng(0)
    for folder in ("train_img", "train_label"):
        (tmp_path / "noise/train" / folder).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(rng.integers(0, 256, (37, 91, 3), dtype=np.uint8)).save(
                tmp_path / "noise/train" / folder / f"{i}.png"
            )
    return tmp_path / "noise"


# ---------------------------------------------------------------- the template's interface


@pytest.mark.parametrize(
    "video_len, partial, windows",
    [(7, 1.0, 3), (1, 1.0, 23), (23, 1.0, 1), (4, 0.5, 2), (11, 0.5, 1), (5, 0.99, 4)],
)
def test_windows_in_numeric_order(data, video_len, partial, windows):
    dataset = Dataset_Dance(data, transforms.ToTensor(), "train", video_len, partial)
    assert len(dataset) == windows == int(COUNT * partial) // video_len
    for i in range(windows):
        imgs, labels = dataset[i]
        assert imgs.shape == labels.shape == (video_len, 3, 10, 20) and imgs.dtype == torch.float32
        expected = list(range(i * video_len, (i + 1) * video_len))
        assert numbers(imgs) == expected == numbers(labels, 100)
    with pytest.raises(IndexError):
        dataset[windows]
    assert len(list(dataset)) == windows  # a for loop ends


def test_defaults_and_modes(data):
    assert Dataset_Dance(data, transforms.ToTensor())[0][0].shape[0] == 7
    imgs, labels = Dataset_Dance(str(data), transforms.ToTensor(), mode="val", video_len=5)[0]
    assert numbers(imgs) == list(range(5)) == numbers(labels, 100)
    with pytest.raises(ValueError):
        Dataset_Dance(data, transforms.ToTensor(), mode="validate")


def test_test_mode(data):
    dataset = Dataset_Dance(data, frame_transform(4, 8), mode="test")
    assert len(dataset) == 3  # in the order of the folders' numbers
    for (img, label), sequence in zip(dataset, (9, 10, 11)):
        assert img.shape == (1, 3, 4, 8) and label.shape == (6, 3, 4, 8)
        assert numbers(img) == [sequence] and numbers(label, 100) == list(range(6))


def test_any_torchvision_transform(data):
    normalized = transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)
    for transform, shape in [
        (transforms.ToTensor(), (3, 10, 20)),
        (transforms.Compose([transforms.Grayscale(), transforms.ToTensor()]), (1, 10, 20)),
        (transforms.PILToTensor(), (3, 10, 20)),
        (v2.Compose([v2.ToImage(), v2.Resize((4, 4)), v2.ToDtype(torch.float32)]), (3, 4, 4)),
        (transforms.Compose([transforms.RandomCrop(8), *normalized]), (3, 8, 8)),
    ]:
        imgs, labels = Dataset_Dance(data, transform, "train", 3)[1]
        assert imgs.shape == labels.shape == (3, *shape)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(data, workers):
    dataset = Dataset_Dance(data, frame_transform(4, 8), "train", 7)
    batches = list(DataLoader(dataset, 2, num_workers=workers, drop_last=True))
    assert len(batches) == 1
    expected = [list(range(7)), list(range(7, 14))]
    assert numbers(batches[0][0]) == expected == numbers(batches[0][1], 100)


# ---------------------------------------------------------------- the cache


def stored(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}


def test_cached_batches_equal_resize_and_to_tensor(noise):
    plain = Dataset_Dance(noise, frame_transform(8, 16), "train", 3)
    frames = Frames(noise, "train", 8, 16)
    cached = Dataset_Dance(noise, frame_transform(8, 16), "train", 3, frames=frames)
    assert frames.imgs.dtype == torch.uint8 and len(plain) == len(cached) == 3
    for (a, b), (c, d) in zip(plain, cached):
        assert torch.equal(a, c) and torch.equal(b, d)
    index = torch.tensor([[0, 8], [4, 4]])
    for a, b in zip(plain.take(index), cached.take(index)):
        assert a.shape == (2, 2, 3, 8, 16) and torch.equal(a, b)

    batches = list(WindowLoader(cached, 2))
    assert len(batches) == len(WindowLoader(cached, 2)) == 1  # the last, smaller one is dropped
    for a, b in zip(batches[0], next(iter(DataLoader(plain, 2)))):
        assert torch.equal(a, b)
    reverse = [imgs for imgs, _ in WindowLoader(cached, 1, [2, 1, 0])]
    assert torch.equal(torch.cat(reverse), torch.stack([plain[i][0] for i in (2, 1, 0)]))


def test_every_value_of_a_byte_is_what_to_tensor_gives():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert torch.equal(
        to_float(torch.from_numpy(every).permute(2, 0, 1)),
        transforms.ToTensor()(Image.fromarray(every)),
    )


def test_the_cache_is_remade_when_an_image_changes(noise):
    folder = noise / ".frame_cache"
    first = Frames(noise, "train", 8, 16).imgs.clone()
    before = stored(folder)
    assert len(before) == 2 and torch.equal(Frames(noise, "train", 8, 16).imgs, first)
    assert stored(folder) == before

    path = noise / "train/train_img/4.png"
    status = path.stat()
    # another size on disk, at the same time of change
    Image.new("RGB", (91, 37), (255, 0, 0)).save(path, format="BMP")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = Frames(noise, "train", 8, 16).imgs
    assert not torch.equal(changed[4], first[4]) and torch.equal(changed[:4], first[:4])
    assert len(stored(folder)) == 3

    size = path.stat().st_size
    Image.new("RGB", (91, 37), (0, 255, 0)).save(path, format="BMP")
    assert path.stat().st_size == size  # the same size, at another time
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    again = Frames(noise, "train", 8, 16).imgs
    assert (again[4, 1] == 255).all() and len(stored(folder)) == 4

    assert Frames(noise, "train", 4, 8).imgs.shape == (9, 3, 4, 8) and len(stored(folder)) == 6
    (noise / "train/train_img/4.png").rename(noise / "train/train_img/40.png")
    (noise / "train/train_label/4.png").rename(noise / "train/train_label/40.png")
    assert torch.equal(Frames(noise, "train", 8, 16).imgs[-1], again[4])


def test_images_renamed_among_themselves(noise):
    """Equal in size and times: nothing but the files themselves tells that they changed places."""
    folder = noise / "train/train_img"
    for i in range(2):
        Image.new("RGB", (8, 8), (0, 200 * i, 0)).save(folder / f"{i}.png", compress_level=0)
        os.utime(folder / f"{i}.png", ns=(0, 10**18))
    before = Frames(noise, "train", 8, 16).imgs.clone()
    caches = stored(noise / ".frame_cache")
    assert torch.equal(Frames(noise, "train", 8, 16).imgs, before)
    assert stored(noise / ".frame_cache") == caches
    for old, new in (("0", "x"), ("1", "0"), ("x", "1")):
        (folder / f"{old}.png").rename(folder / f"{new}.png")
    after = Frames(noise, "train", 8, 16).imgs
    assert torch.equal(after[:2], before[:2].flip(0)) and not torch.equal(before[0], before[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's list of maps")
def test_no_file_is_renamed_while_it_is_mapped(noise, monkeypatch):
    def replace(source, target):
        with open("/proc/self/maps") as maps:
            mapped.append(str(source) in maps.read() or str(target) in maps.read())
        original(source, target)

    original, mapped = os.replace, []
    monkeypatch.setattr(os, "replace", replace)
    first = Frames(noise, "train", 8, 16).imgs.clone()
    for path in (noise / ".frame_cache").iterdir():  # a map of another shape is no reason either
        np.save(path, np.zeros((1, 3, 8, 16), np.uint8))
    assert torch.equal(Frames(noise, "train", 8, 16).imgs, first) and mapped == [False] * 4


def test_the_cache_is_never_written_to(noise):
    frames = Frames(noise, "train", 8, 16)
    before = frames.imgs.clone()
    frames.imgs.zero_()
    assert torch.equal(Frames(noise, "train", 8, 16).imgs, before)


def build(root, folder, start, results):
    while time.time() < start:
        pass
    results.put(Frames(root, "train", 8, 16, folder).imgs.long().sum().item())


def test_two_processes_build_the_cache_at_once(noise, tmp_path):
    context = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    )
    results, start = context.Queue(), time.time() + 0.3
    processes = [
        context.Process(target=build, args=(noise, tmp_path / "cache", start, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    sums = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sums == {Frames(noise, "train", 8, 16, tmp_path / "other").imgs.long().sum().item()}
    assert len(stored(tmp_path / "cache")) == 2  # and nothing of what they wrote aside


def test_where_the_cache_is_kept(noise, tmp_path, monkeypatch):
    assert cache_folder(noise) == noise / ".frame_cache"
    assert cache_folder(noise, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (noise / ".frame_cache").rmdir()
    (noise / ".frame_cache").write_text("in the way")
    assert cache_folder(noise) == tmp_path / "xdg" / "pose-conditioned-vae"


def test_no_cache_gives_equal_batches(tiny_data, tmp_path):
    def model(*flags):
        words = [
            "--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--recipe", "template",
            "--num_workers", "1", *flags
        ]
        return Trainer.VAE_Model(Trainer.build_parser().parse_args(words))

    cached, plain = model(), model("--no_cache")
    for loader in ("train_dataloader", "val_dataloader"):
        ours, theirs = list(getattr(cached, loader)()), list(getattr(plain, loader)())
        assert len(ours) == len(theirs) > 0
        assert all(
            torch.equal(a, b) for pair, other in zip(ours, theirs) for a, b in zip(pair, other)
        )


# ---------------------------------------------------------------- cuts


def wander(count, seed, speed=0.6):
    """A bright square that walks over a lit backdrop, uint8 (count, 3, 32, 64).

    The seed decides the room and the path.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :64]
    room = 60 + 80 * rng.random(3)[:, None, None] + 0.7 * x * rng.random() + rng.random() * y
    at = np.array([16.0, 32.0])
    heading = rng.random() * 6
    frames = []
    for _ in range(count):
        heading += rng.normal(0, 0.2)
        at = (at + speed * np.array([np.sin(heading), np.cos(heading)])) % (64, 128)
        row, column = np.minimum(at, (64, 128) - at)  # it turns around at the walls
        figure = np.clip(6 - np.maximum(abs(y - row), abs(x - column)), 0, 1)
        frames.append(room * (1 - figure) + 230 * figure + rng.normal(0, 1.5, room.shape))
    return np.clip(frames, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("lengths", [[40, 60, 30], [2, 50, 2], [25] * 8, [100]])
def test_cuts_are_found_where_they_are(lengths):
    clips = [wander(length, seed) for seed, length in enumerate(lengths)]
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    frames = np.concatenate(clips)
    assert find_clips(frames) == find_clips(torch.from_numpy(frames)) == starts


def test_a_cut_at_the_edge_of_a_block():
    """Differences are taken over 1024 frames at a time."""
    for at in (1023, 1024, 1025):
        frames = np.concatenate([wander(at, 1), wander(1100 - at, 2)])
        assert find_clips(frames) == [0, at, 1100]


@pytest.mark.parametrize("speed", [0.0, 0.3, 1.5, 3.0])
def test_smooth_motion_has_no_cuts(speed):
    assert find_clips(wander(200, 3, speed)) == [0, 200]


def test_motion_that_starts_and_stops_has_no_cuts():
    still = wander(1, 4)
    moving = wander(40, 4)
    frames = np.concatenate([still.repeat(30, 0), moving, moving[-1:].repeat(30, 0)])
    assert find_clips(frames) == [0, 100]


def test_cuts_of_the_demo_data(tiny_data, tmp_path):
    assert find_clips(Frames(tiny_data, "train", 32, 64, tmp_path).imgs) == [0, 16, 32, 48, 64]
    assert find_clips(Frames(tiny_data, "val", 32, 64, tmp_path).imgs) == [0, 20]
    assert len(list_pairs(tiny_data, "train")[0]) == 64


def test_very_short_sequences_have_no_cuts():
    for count in (1, 2, 3):
        assert find_clips(np.zeros((count, 3, 4, 8), np.uint8)) == [0, count]
    assert find_clips(np.zeros((50, 3, 4, 8), np.uint8)) == [0, 50]


@pytest.mark.parametrize("noise", [0, 2])
@pytest.mark.parametrize("held", [2, 3, 5])
def test_held_frames_are_no_cuts(held, noise):
    """A video of a lower frame rate, as it is or compressed once more."""

    def hold(frames):
        frames = frames.repeat(held, 0)
        change = np.random.default_rng(0).integers(-noise, noise + 1, frames.shape)
        return np.clip(frames + change, 0, 255).astype(np.uint8)

    assert find_clips(hold(wander(200, 1, 3.0))) == [0, 200 * held]
    both = np.concatenate([wander(40, 1), wander(50, 2)])
    assert find_clips(hold(both)) == [0, 40 * held, 90 * held]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("at", [2, 30, 60, 95])
def test_a_flash_is_no_cut(at, length):
    for value in (0, 255):
        frames = wander(100, 1)
        frames[at : at + length] = value
        assert find_clips(frames) == [0, 100]


@pytest.mark.parametrize("length", [3, 5, 10, 30])
@pytest.mark.parametrize("held", [1, 3])
def test_a_fade_is_no_cut(length, held):
    share = np.clip((np.arange(100) - 40) / length, 0, 1)[:, None, None, None]
    first, second = wander(100, 1), wander(100, 2)
    for other in (second, 0 * second):
        frames = (first * (1 - share) + other * share).astype(np.uint8).repeat(held, 0)
        assert find_clips(frames) == [0, len(frames)]


def test_stills_have_cuts_between_them():
    stills = np.concatenate([wander(1, 1).repeat(30, 0), wander(1, 2).repeat(30, 0)])
    assert find_clips(stills) == [0, 30, 60]
