"""Turn images on disk into tensors: folder layout and its checks, decoded splits, cuts, windows.

    DR/train/train_img/*.png   DR/train/train_label/*.png     frames and poses, same names
    DR/val/val_img/*.png       DR/val/val_label/*.png         one validation sequence
    DR/test/test_img/{0..4}/*  DR/test/test_label/{0..4}/*    first frames, and all poses

Images are ordered by the one integer in their name. `Dataset_Dance` has the template's interface
and decodes an image whenever a window holds it. Given a `Frames` (every image decoded and resized
once, as uint8), it slices instead; the batches are bitwise identical.
"""

import os
import re
import signal
import traceback
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from utils.cli import INTERRUPTED, UserError  # before PyTorch: see utils/__init__.py

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from utils import distributed
from utils.options import require
from utils.schedules import data_share
from utils.frame_cache import cache_folder, cached, decode, read_image, to_float

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
REACH = 8       # frames to each side that a cut is judged by
LAST_BATCH = 3  # seconds that a loader process has for it after SIGTERM


# ---------------------------------------------------------------- images

def frame_transform(frame_H, frame_W):
    """Return the course's transform: a PIL image to float32 (3, frame_H, frame_W) in [0, 1]."""
    return transforms.Compose([transforms.Resize((frame_H, frame_W)), transforms.ToTensor()])


def image_number(path):
    """Return the one integer in the name of an image ("12.png", "frame12.png")."""
    numbers = re.findall(r"\d+", path.stem)
    if len(numbers) != 1:
        raise UserError(f"{path}: the name holds {len(numbers) or 'no'} integers; "
                        f"expected exactly one, like 12.png")
    return int(numbers[0])


def list_images(folder):
    """Return the images of a folder, ordered by the integers in their names.

    Hidden files and files that are no images are passed over.
    """
    folder = Path(folder)
    try:
        with os.scandir(folder) as entries:
            # a link that points nowhere is kept: reading it fails with its name
            paths = [folder / entry.name for entry in entries if not entry.name.startswith(".")
                     and (not os.path.isdir(entry) if entry.is_symlink() else entry.is_file())]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; "
                        f"expected a folder of images") from None
    images = by_number((path for path in sorted(paths) if path.suffix.lower() in IMAGES),
                       image_number)
    if not images:
        raise UserError(f"{folder}: holds no images; expected files like 0.png")
    return list(images.values())


def by_number(paths, number):
    """Return {number(path): path} in numeric order. UserError where two numbers are equal."""
    numbered = {}
    for path in paths:
        other = numbered.setdefault(number(path), path)
        if other != path:
            raise UserError(f"{path}: has the same number as {other.name}; "
                            f"expected every number once")
    return dict(sorted(numbered.items()))


def list_pairs(root, mode):
    """Return the frames and the pose images of the train or val split: equally long lists."""
    check_root(root, mode)
    frames = list_images(Path(root) / mode / f"{mode}_img")
    labels = list_images(Path(root) / mode / f"{mode}_label")
    frame_at, label_at = ({image_number(p): p for p in paths} for paths in (frames, labels))
    for number in sorted(frame_at.keys() ^ label_at.keys()):
        if number in frame_at:
            raise UserError(f"{frame_at[number]}: has no pose image; "
                            f"expected {labels[0].parent / frame_at[number].name}")
        raise UserError(f"{label_at[number]}: has no frame; "
                        f"expected {frames[0].parent / label_at[number].name}")
    return frames, labels


def list_test_sequences(root):
    """Return [(first frame, pose images)] of every test sequence, ordered by folder number."""
    check_root(root, "test")
    image_root, label_root = Path(root) / "test" / "test_img", Path(root) / "test" / "test_label"
    images, labels = list_number_folders(image_root), list_number_folders(label_root)
    for number in sorted(images.keys() ^ labels.keys()):
        folder, missing, other = ((images[number], "poses", label_root) if number in images
                                  else (labels[number], "first frame", image_root))
        raise UserError(f"{folder}: has no {missing}; expected {other / folder.name}")
    sequences = []
    for number, folder in images.items():
        firsts = list_images(folder)
        if len(firsts) != 1:
            raise UserError(f"{folder}: holds {len(firsts)} images; "
                            f"expected one, the first frame of the sequence")
        sequences.append((firsts[0], list_images(labels[number])))
    # a submission has rows by position: behind a gap they would be another sequence's
    for number in range(min(images), max(images)):
        if number not in images:
            raise UserError(f"{image_root / str(number)}: is missing; expected folders with "
                            f"consecutive numbers, here {min(images)} to {max(images)}")
    return sequences


def list_number_folders(root):
    """Return {number: folder} of the folders below root that are named by a number, in order."""
    try:
        folders = [path for path in Path(root).iterdir()
                   if path.is_dir() and path.name.isdecimal()]
    except OSError as error:
        raise UserError(f"{root}: {error.strerror or error}; "
                        f"expected folders 0, 1, 2, ...") from None
    if not folders:
        raise UserError(f"{root}: holds no sequence; expected folders 0, 1, 2, ...")
    return by_number(sorted(folders), lambda path: int(path.name))


def check_root(root, mode):
    """Raise UserError where the data folder is one or two above or below --DR."""
    root = Path(root)
    if not os.path.isdir(root / mode):
        for folder in folders_around(root):
            if os.path.isdir(folder / mode / f"{mode}_img"):
                raise UserError(f"--DR {root}: holds no {mode}/; expected the folder that has "
                                f"train/, val/ and test/, which is {folder}")


def folders_around(root):
    """Yield the two folders above root, then those one and two levels below it."""
    yield from list(Path(os.path.abspath(root)).parents)[:2]
    level = [root]
    for _ in range(2):
        below = []
        for folder in level:
            with suppress(OSError), os.scandir(folder) as entries:
                # no need to look far: somebody's home may be at --DR
                below += [folder / entry.name for entry in islice(entries, 100)
                          if not entry.name.startswith(".") and entry.is_dir()]
        yield from sorted(below)
        level = below


# ---------------------------------------------------------------- decoded splits

class Frames:
    """Every frame and pose image of a train or val split, uint8 (N, 3, H, W), on one device.

    cache_dir: where the decoded arrays are kept (see `cache_folder`).
    """

    def __init__(self, root, mode, frame_H, frame_W, cache_dir=None, workers=4):
        frames, labels = list_pairs(root, mode)
        folder = cache_folder(root, cache_dir)
        self.imgs, self.labels = (
            torch.from_numpy(cached(paths, frame_H, frame_W, folder, workers,
                                    f"decoding {mode} {what}"))
            for paths, what in ((frames, "frames"), (labels, "poses")))

    def to(self, device):
        """Move to `device` where the set takes at most a quarter of its free memory."""
        if (torch.device(device).type == "cuda"
                and 4 * 2 * self.imgs.numel() < torch.cuda.mem_get_info(device)[0]):
            self.imgs, self.labels = self.imgs.to(device), self.labels.to(device)
        return self

    def take(self, index):
        """Return frames and poses at a tensor of indices, bitwise what ToTensor gives."""
        # index_select copies whole frames, a tensor as an index value by value
        rows = index.flatten().to(self.imgs.device, non_blocking=True)
        return tuple(to_float(images.index_select(0, rows)).unflatten(0, index.shape)
                     for images in (self.imgs, self.labels))

    def windows(self, starts, length):
        """Return the windows of `length` frames that begin at the list `starts`, with their poses.

        As `take`, and faster where each window begins at the end of the previous window.
        """
        first, end = starts[0], starts[0] + len(starts) * length
        if starts == list(range(first, end, length)):
            return tuple(to_float(images[first:end]).unflatten(0, (len(starts), length))
                         for images in (self.imgs, self.labels))
        return self.take(torch.tensor(starts)[:, None] + torch.arange(length))


# ---------------------------------------------------------------- cuts

def find_clips(imgs):
    """Return the start indices of the clips in uint8 frames (N, 3, H, W), and N.

    Clip i is frames [starts[i], starts[i + 1]). A cut is a frame that differs from the previous
    frame by 0.01 more than three times what is usual around it (`usual_jump`; both are mean
    absolute differences), and that starts something new (`comes_back`). A clip has at least two
    frames, so that there is always a frame to predict.
    """
    count = len(imgs)
    jump = np.zeros(count)
    for start in range(1, count, 1024):
        jump[start:start + 1024] = mean_difference(imgs[start:start + 1024],
                                                   imgs[start - 1:min(start + 1023, count - 1)])
    moved = np.flatnonzero(jump)  # a held frame is no motion
    starts = [0]
    for i in np.flatnonzero(jump[moved] > 0.01):
        t, limit = int(moved[i]), 0.01 + 3 * usual_jump(jump[moved], i)
        if (jump[t] > limit and t - starts[-1] >= 2 and count - t >= 2
                and not comes_back(imgs, t, limit)):
            starts.append(t)
    return starts + [count]


def usual_jump(jump, i):
    """Return the median of the 16 jumps around jump i, far smaller ones left out.

    A held frame that was compressed once more has such a small jump, and so has the frame before
    or after a fade: a median that counts them would take ordinary motion, or a fade, for a cut.
    """
    first = max(0, min(i - REACH, len(jump) - 1 - 2 * REACH))  # 16 at the ends, too
    around = np.sort(np.delete(jump[first:first + 2 * REACH + 1], i - first))
    return np.median(around[around >= around[-2:][0] / 3]) if len(around) else 0.0


def comes_back(imgs, t, limit):
    """Return whether a frame soon after a jump at t is like one before it, as after a flash."""
    after, before = imgs[t + 1:t + REACH], imgs[max(0, t - REACH):t - 1]
    return any(len(frames) and mean_difference(frames, imgs[at:at + 1]).min() <= limit
               for frames, at in ((after, t - 1), (before, t)))


def mean_difference(frames, others):
    """Return the mean absolute difference of each pair of uint8 frames, (N,), 1 being white."""
    frames, others = (np.asarray(torch.as_tensor(x).cpu(), dtype=np.float32)  # may be on a GPU
                      for x in (frames, others))
    return np.abs(frames - others).mean((1, 2, 3)) / 255


# ---------------------------------------------------------------- the dataset and its loaders

class Dataset_Dance(Dataset):
    """Windows of consecutive frames with their poses.

    root: the data folder (--DR). transform: any torchvision transform of a PIL image; not used
    where `frames`, a `Frames` of this split, is given to slice from. mode: train, val or test.
    video_len: frames a window; sample i starts at frame i * video_len. partial: the first share of
    the frames, in (0, 1].

    A sample is (imgs, labels), each (video_len, 3, H, W); in test mode the first frame
    (1, 3, H, W) and all poses (n, 3, H, W) of a sequence. UserError where the folders don't hold
    what they should.
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
            raise UserError(f"{self.root / mode / f'{mode}_img'}: holds {self.n_frames} frames"
                            f"{used}; expected at least {video_len} for one window "
                            f"(--{'train' if mode == 'train' else 'val'}_vi_len)")

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
        """Return frames and poses at a tensor of frame indices, each (*index.shape, 3, H, W)."""
        if self.frames is not None:
            return self.frames.take(index)
        rows = index.flatten().tolist()
        return tuple(self.read([paths[i] for i in rows]).unflatten(0, index.shape)
                     for paths in (self.img_paths, self.label_paths))

    def read(self, paths):
        """Decode and transform images, (len(paths), 3, H, W)."""
        return torch.stack([self.transform(read_image(path)) for path in paths])


def _leave_signals_to_the_parent(worker):
    """Set up a loader process: its parent alone decides what a signal means.

    Ctrl-C and the like come to the whole group. SIGTERM may come to the group too, and is also how
    a process ends its children: so it ends this one, but late enough for a batch that the parent
    still waits for.
    """
    for number in INTERRUPTED:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, where a parent ends its children without asking
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LAST_BATCH))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTED)  # `signals_blocked` blocked them


@contextmanager
def signals_blocked():
    """Inside, Ctrl-C and the like wait; a process that is started there inherits that."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ImageLoader(DataLoader):
    """A DataLoader that leaves signals to this process and whose errors are one line.

    num_workers: loader processes, at most one for each core that this process may use.
    """

    def __init__(self, dataset, batch_size, num_workers=0, **options):
        # a generator of its own: starting a loader must not move the one that training draws from
        super().__init__(dataset, batch_size, num_workers=min(num_workers, usable_cores()),
                         generator=torch.Generator(),
                         worker_init_fn=_leave_signals_to_the_parent, **options)

    def __iter__(self):
        try:
            yield from self.started()
        except Exception as error:
            # PyTorch's frames hold the error that holds them, and the loader processes with them
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, UserError):  # the loader process's traceback stands before it
                raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
            if isinstance(error, OSError):  # no more processes, or no more open files
                raise UserError(f"--num_workers {self.num_workers}: {error.strerror or error}; "
                                f"expected fewer processes, or --num_workers 0") from None
            raise

    def started(self):
        """Return a DataLoader's iterator, its processes started without a signal in between.

        One that comes between a process's start and its set-up would end it with a traceback.
        """
        with signals_blocked():
            return super().__iter__()


def usable_cores():
    """Return how many cores this process may use: taskset and batch systems give fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WindowLoader:
    """Batches of windows sliced from a `Frames`-backed dataset, in order or along `order`.

    Yields (imgs, labels) as a DataLoader does, each (batch_size, video_len, 3, H, W) float32. The
    last, smaller batch is dropped.
    """

    def __init__(self, dataset, batch_size, order=None):
        self.dataset, self.batch_size = dataset, batch_size
        self.order = torch.arange(len(dataset)) if order is None else torch.as_tensor(order)

    def __len__(self):
        return len(self.order) // self.batch_size

    def __iter__(self):
        length, size = self.dataset.video_len, self.batch_size
        starts = (self.order * length).tolist()
        for batch in range(len(self)):
            yield self.dataset.frames.windows(starts[batch * size:(batch + 1) * size], length)


def window_loader(dataset, batch_size, workers, order=None):
    """Return batches of a dataset's windows along `order`: sliced from decoded frames, or decoded by worker processes."""
    if dataset.frames is not None:
        return WindowLoader(dataset, batch_size, order)
    return ImageLoader(dataset, batch_size, workers, sampler=order, drop_last=True)


# ---------------------------------------------------------------- what a training stage needs

POSE_SAMPLE = 4096  # training poses for BatchNorm recalibration


def open_split(args, mode, video_len, partial, decoded, device):
    """Return the Dataset_Dance of a split, whose frames are decoded once unless --no_cache.

    decoded: the splits' `Frames` so far, a dict by mode.
    """
    require(args, "DR")
    size = args.frame_H, args.frame_W
    if mode not in decoded and not args.no_cache:
        frames = Frames(args.DR, mode, *size, args.cache_dir, args.num_workers)
        decoded[mode] = frames.to(device)
    transform = frame_transform(*size)
    return Dataset_Dance(args.DR, transform, mode, video_len, partial, decoded.get(mode))


def open_training_data(model):
    """Decode the data of a model's training stage and start its pool, before anything is written."""
    args, state, session = model.args, model.state, model.session
    require(args, "DR", "save_root")
    Dataset_Dance(args.DR, None, "val", args.val_vi_len)  # what needs no decoding first
    # the epochs that see least data need a batch, too
    share = min(data_share(args, epoch) for epoch in (state.epoch, args.num_epoch - 1))
    share = 1.0 if args.pool else share
    windows = len(Dataset_Dance(args.DR, None, "train", args.train_vi_len, share))
    check_batch_size(args, windows, distributed.world())

    model.dataset("val", args.val_vi_len)
    dataset = model.dataset("train", args.train_vi_len)
    state.train_frames = dataset.n_frames
    if args.refresh_norm:
        session.poses = sample_poses(dataset, POSE_SAMPLE, args)
    if args.pool:
        session.clips = clips_of(dataset, args)
        seed = args.seed + distributed.rank()
        state.pool = RolloutPool(dataset, session.clips, args.pool, seed, model.device)


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
