"""Pictures on disk to tensors: the folder layout and its checks, the cache of decoded frames, cuts, and windows.

    DR/train/train_img/*.png   DR/train/train_label/*.png     frames and pose pictures, same file names
    DR/val/val_img/*.png       DR/val/val_label/*.png         one validation sequence
    DR/test/test_img/{0..4}/*  DR/test/test_label/{0..4}/*    first frames, and all poses

Pictures are ordered by the one integer in their name. `Dataset_Dance` has the template's interface and decodes a picture
whenever it is asked for. Given a `Frames` (every picture decoded and resized once, as uint8), it slices instead; the
batches are bit for bit the same.
"""

import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path

from utils.cli import INTERRUPTED, UserError  # before PyTorch: see utils/__init__.py

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from utils.frame_cache import cache_folder, cached, decode, read_image, to_float

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


# ---------------------------------------------------------------- pictures

def frame_transform(frame_H, frame_W):
    """The course's transform: a PIL picture to float32 (3, frame_H, frame_W) in [0, 1]."""
    return transforms.Compose([transforms.Resize((frame_H, frame_W)), transforms.ToTensor()])


def image_number(path):
    """The one integer in a picture's name ("12.png", "frame12.png")."""
    numbers = re.findall(r"\d+", path.stem)
    if len(numbers) != 1:
        raise UserError(f"{path}: the name holds {len(numbers) or 'no'} integers; expected exactly one, like 12.png")
    return int(numbers[0])


def list_images(folder):
    """The pictures of a folder, in the order of the integers in their names. Hidden and other files are passed over."""
    folder = Path(folder)
    try:
        with os.scandir(folder) as entries:  # a link that points nowhere is kept, and named when it can't be read
            paths = [folder / entry.name for entry in entries if not entry.name.startswith(".")
                     and (not os.path.isdir(entry) if entry.is_symlink() else entry.is_file())]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; expected a folder of pictures") from None
    numbered = {}
    for path in sorted(paths):
        if path.suffix.lower() not in IMAGES:
            continue
        other = numbered.setdefault(image_number(path), path)
        if other != path:
            raise UserError(f"{path}: has the same number as {other.name}; expected one picture a number")
    if not numbered:
        raise UserError(f"{folder}: holds no pictures; expected files like 0.png")
    return [numbered[number] for number in sorted(numbered)]


def list_pairs(root, mode):
    """Frames and pose pictures of the train or val split, pair by pair in order: two equally long lists of paths."""
    frames = list_images(Path(root) / mode / f"{mode}_img")
    labels = list_images(Path(root) / mode / f"{mode}_label")
    frame_numbers, label_numbers = ({image_number(p): p for p in paths} for paths in (frames, labels))
    for number in sorted(frame_numbers.keys() ^ label_numbers.keys()):
        if number in frame_numbers:
            raise UserError(f"{frame_numbers[number]}: has no pose picture; expected {labels[0].parent / frame_numbers[number].name}")
        raise UserError(f"{label_numbers[number]}: has no frame; expected {frames[0].parent / label_numbers[number].name}")
    return frames, labels


def list_test_sequences(root):
    """[(first frame, pose pictures)] of every test sequence, in the order of the folders' numbers."""
    image_root, label_root = Path(root) / "test" / "test_img", Path(root) / "test" / "test_label"
    sequences = []
    for folder in list_number_folders(image_root):
        firsts = list_images(folder)
        if len(firsts) != 1:
            raise UserError(f"{folder}: holds {len(firsts)} pictures; expected one, the first frame of the sequence")
        sequences.append((firsts[0], list_images(label_root / folder.name)))
    extra = {path.name for path in list_number_folders(label_root)} - {labels[0].parent.name for _, labels in sequences}
    if extra:
        raise UserError(f"{label_root / min(extra)}: has no first frame; expected one in {image_root / min(extra)}")
    return sequences


def list_number_folders(root):
    """The folders named 0, 1, 2, ... below root, in that order."""
    try:
        folders = [path for path in Path(root).iterdir() if path.is_dir() and path.name.isdecimal()]
    except OSError as error:
        raise UserError(f"{root}: {error.strerror or error}; expected folders 0, 1, 2, ...") from None
    if not folders:
        raise UserError(f"{root}: holds no sequence; expected folders 0, 1, 2, ...")
    return sorted(folders, key=lambda path: int(path.name))


# ---------------------------------------------------------------- decoded splits

class Frames:
    """Every frame and pose picture of a train or val split, uint8 (N, 3, H, W), on one device.

    cache_dir: where the decoded arrays are kept (see `cache_folder`).
    """

    def __init__(self, root, mode, frame_H, frame_W, cache_dir=None, workers=4):
        frames, labels = list_pairs(root, mode)
        folder = cache_folder(root, cache_dir)
        self.imgs, self.labels = (torch.from_numpy(cached(paths, frame_H, frame_W, folder, workers, f"decoding {mode} {what}"))
                                  for paths, what in ((frames, "frames"), (labels, "poses")))

    def to(self, device):
        """Move to `device` where the set takes at most a quarter of the free memory there; stay on the CPU otherwise."""
        if torch.device(device).type == "cuda" and 4 * 2 * self.imgs.numel() < torch.cuda.mem_get_info(device)[0]:
            self.imgs, self.labels = self.imgs.to(device), self.labels.to(device)
        return self

    def take(self, index):
        """Frames and poses at a tensor of indices: float32 in [0, 1], bit for bit what ToTensor gives."""
        rows = index.flatten().to(self.imgs.device, non_blocking=True)  # index_select copies whole pictures, a tensor as an index value by value
        return tuple(to_float(pictures.index_select(0, rows)).unflatten(0, index.shape) for pictures in (self.imgs, self.labels))

    def windows(self, starts, length):
        """The windows of `length` frames that begin at `starts`, a list, with their poses: as `take`, and faster where they touch."""
        first, end = starts[0], starts[0] + len(starts) * length
        if starts == list(range(first, end, length)):
            return tuple(to_float(pictures[first:end]).unflatten(0, (len(starts), length)) for pictures in (self.imgs, self.labels))
        return self.take(torch.tensor(starts)[:, None] + torch.arange(length))


# ---------------------------------------------------------------- cuts

def find_clips(imgs):
    """Start indices of the clips in uint8 frames (N, 3, H, W), and N: clip i is frames [starts[i], starts[i + 1]).

    A cut is a frame that differs from the one before by 0.01 more than three times what is usual around it
    (mean absolute difference against the median over eight frames to each side).
    """
    count, reach = len(imgs), 8
    jump = np.zeros(count)
    for start in range(1, count, 1024):
        block = np.asarray(torch.as_tensor(imgs[start - 1:start + 1024]).cpu(), dtype=np.float32)  # a GPU may hold them
        jump[start:start + 1024] = np.abs(np.diff(block, axis=0)).mean((1, 2, 3)) / 255
    starts = [0]
    for t in range(1, count):
        around = np.r_[jump[max(1, t - reach):t], jump[t + 1:t + 1 + reach]]
        # a clip has at least two frames, so that there is always a frame to predict
        if len(around) and jump[t] > 0.01 + 3 * np.median(around) and t - starts[-1] >= 2 and count - t >= 2:
            starts.append(t)
    return starts + [count]


# ---------------------------------------------------------------- the dataset and its loaders

class Dataset_Dance(Dataset):
    """Windows of consecutive frames with their poses.

    root: the data folder (--DR). transform: any torchvision transform of a PIL image. mode: train, val or test.
    video_len: frames a window; sample i starts at frame i * video_len. partial: the first share of the frames, in (0, 1].
    frames: a `Frames` of this split to slice from, in place of decoding; `transform` is not used then.

    A sample is (imgs, labels), each (video_len, 3, H, W); in test mode the first frame (1, 3, H, W) and all poses
    (n, 3, H, W) of a sequence. UserError where the folders don't hold what they should.
    """

    def __init__(self, root, transform, mode="train", video_len=7, partial=1.0, frames=None):
        if mode not in ("train", "val", "test"):
            raise ValueError(f"mode is train, val or test, not {mode!r}")
        self.root, self.transform, self.mode = Path(root), transform, mode
        self.video_len, self.partial, self.frames = video_len, partial, frames
        if mode == "test":
            self.sequences = list_test_sequences(root)
            return
        if frames is None:
            self.img_paths, self.label_paths = list_pairs(root, mode)
        self.n_frames = len(self.img_paths) if frames is None else len(frames.imgs)
        if len(self) == 0:
            used = f", of which a share of {partial:g} is used" if partial < 1 else ""
            raise UserError(f"{self.root / mode / f'{mode}_img'}: holds {self.n_frames} frames{used}; expected at least "
                            f"{video_len} for one window (--{'train' if mode == 'train' else 'val'}_vi_len)")

    def __len__(self):
        if self.mode == "test":
            return len(self.sequences)
        return int(self.n_frames * self.partial) // self.video_len

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.mode == "test":
            first, labels = self.sequences[index]
            return self.read([first]), self.read(labels)
        return self.take(torch.arange(index * self.video_len, (index + 1) * self.video_len))

    def take(self, index):
        """Frames and poses at a tensor of frame indices, each (*index.shape, 3, H, W)."""
        if self.frames is not None:
            return self.frames.take(index)
        return tuple(self.read([paths[i] for i in index.flatten().tolist()]).unflatten(0, index.shape)
                     for paths in (self.img_paths, self.label_paths))

    def read(self, paths):
        """Decoded and transformed pictures, (len(paths), 3, H, W)."""
        return torch.stack([self.transform(read_image(path)) for path in paths])


def _quiet(worker):
    """Workers leave Ctrl-C and the like, which may come to the whole group, to the process that started them, and end with it."""
    for number in INTERRUPTED:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def no_signals():
    """Inside, Ctrl-C and the like wait, for good in processes that are started there."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ImageLoader(DataLoader):
    """A DataLoader whose workers' UserErrors arrive as they were raised, not inside a traceback."""

    def __init__(self, dataset, batch_size, **options):
        # a generator of its own: starting a loader must not move the one that training draws from
        super().__init__(dataset, batch_size, generator=torch.Generator(), worker_init_fn=_quiet, **options)

    def __iter__(self):
        try:
            with no_signals():  # one that came between a worker's start and `_quiet` would end it
                batches = super().__iter__()
            yield from batches
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


class WindowLoader:
    """Batches of windows sliced from a `Frames`-backed dataset where it lies, in order or along `order`; like a DataLoader.

    Yields (imgs, labels), each (batch_size, video_len, 3, H, W) float32. The last, smaller batch is dropped.
    """

    def __init__(self, dataset, batch_size, order=None):
        self.dataset, self.batch_size = dataset, batch_size
        self.order = torch.arange(len(dataset)) if order is None else torch.as_tensor(order)

    def __len__(self):
        return len(self.order) // self.batch_size

    def __iter__(self):
        length = self.dataset.video_len
        starts = (self.order * length).tolist()
        for batch in range(len(self)):
            yield self.dataset.frames.windows(starts[batch * self.batch_size:(batch + 1) * self.batch_size], length)


def window_loader(dataset, batch_size, workers, order=None):
    """Return batches of a dataset's windows along `order`: sliced from decoded frames, or decoded by worker processes."""
    if dataset.frames is not None:
        return WindowLoader(dataset, batch_size, order)
    workers = min(workers, os.cpu_count() or 1)
    return ImageLoader(dataset, batch_size, sampler=order, drop_last=True, num_workers=workers)


# ---------------------------------------------------------------- what a training stage needs

def check_batch_size(args, windows, world):
    """Raise UserError where a batch holds more than the pool's rollouts, or than this many windows on each rank."""
    if args.pool and args.batch_size > args.pool:
        raise UserError(f"--batch_size {args.batch_size}: expected at most the {args.pool} rollouts of --pool")
    if not args.pool and windows // world < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size}: the training data hold {windows} windows of "
                        f"{args.train_vi_len} frames for {world} process(es); expected at least one batch each")


def sample_poses(dataset, count, args):
    """Return at most `count` poses spread over a dataset, uint8 (N, 3, H, W)."""
    chosen = torch.linspace(0, dataset.n_frames - 1, min(dataset.n_frames, count)).round().long()
    if dataset.frames:
        return dataset.frames.labels[chosen.to(dataset.frames.labels.device)]
    paths = [dataset.label_paths[i] for i in chosen]
    return torch.from_numpy(decode(paths, args.frame_H, args.frame_W, args.num_workers))


def clips_of(dataset, args):
    """Return `find_clips` of a dataset's frames."""
    if dataset.frames:
        return find_clips(dataset.frames.imgs)
    imgs = decode(dataset.img_paths, args.frame_H, args.frame_W, args.num_workers, desc="finding cuts")
    return find_clips(imgs)


class RolloutPool:
    """Rollouts that run beside the training; each holds the frame that it generated last.

    A training step draws a few of them, predicts from each one's frame a frame of the same clip, and
    puts the prediction back. So the network trains on frames that are dozens of its own steps deep, at
    the price of one step. A teacher-forced rollout restarts from a true frame anywhere in the data.

    dataset: a Dataset_Dance of the train split. clips: `find_clips` of its frames; no window crosses a
    cut. device: where the network is; the pool's frames stay there.
    """

    def __init__(self, dataset, clips, size, seed, device="cpu"):
        self.dataset, self.clips, self.device = dataset, torch.tensor(clips), device
        self.generator = torch.Generator().manual_seed(seed)
        self.position = self.random_positions(size)  # (size,), index of each frame in the data
        self.frames = dataset.take(self.position)[0].to(device)  # (size, 3, H, W) in [0, 1]

    def random_positions(self, count):
        """Return `count` indices of training frames."""
        return torch.randint(int(self.clips[-1]), (count,), generator=self.generator)

    def draw(self, batch_size, length, next_share, teacher_forced):
        """Return windows and poses, each (B, length, 3, H, W); frame 0 is a rollout's.

        teacher_forced: bool (B,), rollouts that restart from a true frame.
        """
        drawn = torch.randperm(len(self.position), generator=self.generator)[:batch_size]
        position = torch.where(teacher_forced, self.random_positions(batch_size), self.position[drawn])

        # the frames to predict: those that follow in the clip, or any others of it
        clip = torch.searchsorted(self.clips, position, right=True)
        first = self.clips[clip - 1]
        last = (self.clips[clip] - length + 1).clamp(min=first)
        uniform = torch.rand(batch_size, generator=self.generator)
        anywhere = first + (uniform * (last - first + 1)).long()
        uniform = torch.rand(batch_size, generator=self.generator)
        follows = (uniform < next_share) & (position + 1 <= last)
        start = torch.where(follows, position + 1, anywhere)
        # a clip shorter than a window repeats its last frame
        index = start[:, None] + torch.arange(length - 1)
        index = torch.minimum(index, self.clips[clip][:, None] - 1)

        # the previous frame: the true one under teacher forcing, else the one generated last
        self.drawn, self.arrived = drawn, index[:, -1]
        self.rows, forced, truth, img, label = (x.to(self.device, non_blocking=True) for x in (
            drawn, teacher_forced.view(-1, 1, 1, 1), self.dataset.take(position)[0],
            *self.dataset.take(index)))
        self.previous = torch.where(forced, truth, self.frames.index_select(0, self.rows))
        # a step never looks at the pose of the previous frame: any pose will do in its place
        return torch.cat([self.previous[:, None], img], 1), torch.cat([label[:, :1], label], 1)

    def put(self, generated):
        """Store the last frames (B, 3, H, W) generated from the drawn windows, clamped to [0, 1]."""
        finite = generated.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        frames = torch.where(finite, generated.float().clamp(0, 1), self.previous)
        self.frames.index_copy_(0, self.rows, frames)
        self.position[self.drawn] = self.arrived

    def state_dict(self):
        """Return where every rollout stands, and the random generator's state."""
        return {"generator": self.generator.get_state(), "position": self.position,
                "frames": self.frames.cpu()}

    def load_state_dict(self, state):
        """Take the state of `state_dict`; a pool of another size or frame shape starts anew."""
        if state["frames"].shape != self.frames.shape:
            return
        self.generator.set_state(state["generator"])
        self.position = state["position"].clamp(max=int(self.clips[-1]) - 1)
        self.frames = state["frames"].to(self.device)
