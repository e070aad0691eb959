"""Turn a data folder into tensors: decoded splits, windows, and the rollout pool.

    dataset = Dataset_Dance("data", frame_transform(32, 64), "train", video_len=16)
    imgs, labels = dataset[0]  # frames and poses, each (16, 3, 32, 64) in [0, 1]

`Dataset_Dance` has the template's interface and decodes an image whenever a window holds it. Given
a `Frames` (every image decoded and resized once, as uint8), the dataset slices instead; the batches
are bitwise identical. The layout of the folder is in utils/data_folder.py, its cuts in
utils/cuts.py.
"""

from pathlib import Path

from utils.cli import UserError  # before PyTorch: see utils/__init__.py

import torch
from torch.utils.data import Dataset

from utils import distributed
from utils.cuts import find_clips
from utils.data_folder import (  # noqa: F401 (scripts import them from this module)
    image_number, list_images, list_pairs, list_test_sequences, report_gap)
from utils.frame_cache import cache_folder, cached, decode, read_image, to_float
from utils.loader_processes import ImageLoader
from utils.options import require
from utils.schedules import data_share

POSE_SAMPLE = 4096  # training poses for BatchNorm recalibration


# ---------------------------------------------------------------- decoded splits

def frame_transform(frame_H, frame_W):
    """Return the course's transform: a PIL image to float32 (3, frame_H, frame_W) in [0, 1]."""
    from torchvision import transforms  # a second and a half, which decoded frames do without

    return transforms.Compose([transforms.Resize((frame_H, frame_W)), transforms.ToTensor()])


class Frames:
    """Hold every frame and pose image of a train or val split, uint8 (N, 3, H, W), on one device.

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
        """Move to a CUDA device if the split takes at most a quarter of its free memory."""
        if (torch.device(device).type == "cuda"
                and 4 * 2 * self.imgs.numel() < torch.cuda.mem_get_info(device)[0]):
            self.imgs, self.labels = self.imgs.to(device), self.labels.to(device)
        return self

    def take(self, index):
        """Return frames and poses at a tensor of indices, each (*index.shape, 3, H, W).

        Values are float32 in [0, 1], bitwise what ToTensor gives.
        """
        # faster than imgs[rows]: index_select copies whole frames, indexing value by value
        rows = index.flatten().to(self.imgs.device, non_blocking=True)
        return tuple(to_float(images.index_select(0, rows)).unflatten(0, index.shape)
                     for images in (self.imgs, self.labels))

    def windows(self, starts, length):
        """Return the windows that begin at a list of frame indices, and their poses.

        Both are (len(starts), length, 3, H, W), with the values of `take`. Faster than `take` where
        each window begins at the end of the previous window.
        """
        first, end = starts[0], starts[0] + len(starts) * length
        if starts == list(range(first, end, length)):
            return tuple(to_float(images[first:end]).unflatten(0, (len(starts), length))
                         for images in (self.imgs, self.labels))
        return self.take(torch.tensor(starts)[:, None] + torch.arange(length))


# ---------------------------------------------------------------- the dataset and its loaders

class Dataset_Dance(Dataset):
    """Give windows of consecutive frames with their poses.

    root: the data folder (--DR). transform: any torchvision transform of a PIL image; not used
    where `frames`, a `Frames` of this split, is given to slice from. mode: train, val or test.
    video_len: frames of a window; sample i starts at frame i * video_len. partial: the first share
    of the frames, in (0, 1].

    A sample is (imgs, labels), each (video_len, 3, H, W); in test mode the first frame
    (1, 3, H, W) and all poses (n, 3, H, W) of a sequence. UserError for a folder that lacks images
    or has another layout.
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
        """Return images, decoded and transformed, (len(paths), 3, H, W)."""
        return torch.stack([self.transform(read_image(path)) for path in paths])


class WindowLoader:
    """Slice batches of windows from a dataset that has a `Frames`, in order or along `order`.

    Yields (imgs, labels) as a DataLoader does, each (batch_size, video_len, 3, H, W), float32 in
    [0, 1]. A last, smaller batch is dropped.
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
    """Return batches of a dataset's windows along `order`, a `WindowLoader` or an `ImageLoader`.

    workers: loader processes that decode, where the dataset has no decoded frames to slice.
    """
    if dataset.frames is not None:
        return WindowLoader(dataset, batch_size, order)
    return ImageLoader(dataset, batch_size, workers, sampler=order, drop_last=True)


# ---------------------------------------------------------------- what a training stage needs

def open_split(args, mode, video_len, partial, decoded, device):
    """Return the Dataset_Dance of a split, whose frames are decoded once unless --no_cache.

    decoded: a dict of `Frames` by mode, to which a split decoded by this call is added.
    """
    require(args, "DR")
    size = args.frame_H, args.frame_W
    if mode not in decoded and not args.no_cache:
        frames = Frames(args.DR, mode, *size, args.cache_dir, args.num_workers)
        decoded[mode] = frames.to(device)
    frames = decoded.get(mode)
    transform = frame_transform(*size) if frames is None else None
    return Dataset_Dance(args.DR, transform, mode, video_len, partial, frames)


def open_training_data(model):
    """Decode the data of a model's training stage and start its pool; write nothing into save_root.

    UserError for data that are missing or too few for one batch.
    """
    args, state, session = model.args, model.state, model.session
    require(args, "DR", "save_root")
    # mistakes in the validation data show before minutes of decoding
    validation = Dataset_Dance(args.DR, None, "val", args.val_vi_len)
    # the epochs that see the least data need a batch, too
    share = min(data_share(args, epoch) for epoch in (state.epoch, args.num_epoch - 1))
    share = 1.0 if args.pool else share
    training = Dataset_Dance(args.DR, None, "train", args.train_vi_len, share)
    check_batch_size(args, len(training), distributed.world())
    for files in (training, validation):
        report_gap(files.img_paths)

    model.dataset("val", args.val_vi_len)
    if args.no_cache:  # an image that can't be read would end the run after a whole epoch
        paths = validation.img_paths + validation.label_paths
        decode(paths, args.frame_H, args.frame_W, args.num_workers, desc="checking val images")
    dataset = model.dataset("train", args.train_vi_len)
    state.train_frames = dataset.n_frames
    if args.refresh_norm:
        session.poses = sample_poses(dataset, POSE_SAMPLE, args)
    if args.pool:
        session.clips = clips_of(dataset, args)
        seed = args.seed + distributed.rank()
        state.pool = RolloutPool(dataset, session.clips, args.pool, seed, model.device)


def check_batch_size(args, windows, world):
    """Raise UserError where a batch needs more rollouts, or more windows on a rank, than there are.

    windows: those of the training data, divided among `world` processes.
    """
    if args.pool and args.batch_size > args.pool:
        raise UserError(f"--batch_size {args.batch_size}: expected at most the {args.pool} "
                        f"rollouts of --pool")
    if not args.pool and windows // world < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size}: the training data hold {windows} windows "
                        f"of {args.train_vi_len} frames for {world} process(es); expected at least "
                        f"one batch each")


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
    imgs = decode(dataset.img_paths, args.frame_H, args.frame_W, args.num_workers,
                  desc="finding cuts")
    return find_clips(imgs)


class RolloutPool:
    """Keep rollouts that run beside the training, each with its last generated frame.

    A training step draws a few rollouts, predicts from the frame of each a frame of the same clip,
    and puts the prediction back. So previous frames are dozens of generated frames deep, at the
    cost of one step. A teacher-forced rollout restarts from a true frame anywhere in the data.

    dataset: a Dataset_Dance of the train split. clips: `find_clips` of its frames; no window
    crosses a cut. device: where the network is; the pool's frames stay there.
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

        next_share: probability in [0, 1] that a window is the next one of its clip, else any one.
        teacher_forced: bool (B,), rollouts that restart from a true frame.
        """
        drawn = torch.randperm(len(self.position), generator=self.generator)[:batch_size]
        restart = self.random_positions(batch_size)
        position = torch.where(teacher_forced, restart, self.position[drawn])

        # the frames to predict: those that follow in the clip, or any others of the clip
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

        # the previous frame: the true frame under teacher forcing, else the last generated one
        self.drawn, self.arrived = drawn, index[:, -1]
        self.rows, forced, truth, img, label = (x.to(self.device, non_blocking=True) for x in (
            drawn, teacher_forced.view(-1, 1, 1, 1), self.dataset.take(position)[0],
            *self.dataset.take(index)))
        self.previous = torch.where(forced, truth, self.frames.index_select(0, self.rows))
        # a step never looks at the pose of the previous frame: any pose fills its place
        return torch.cat([self.previous[:, None], img], 1), torch.cat([label[:, :1], label], 1)

    def put(self, generated):
        """Store the last frames generated from the drawn windows, (B, 3, H, W), clamped to [0, 1].

        A frame that is not finite leaves its rollout at the previous frame.
        """
        finite = generated.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        frames = torch.where(finite, generated.float().clamp(0, 1), self.previous)
        self.frames.index_copy_(0, self.rows, frames)
        self.position[self.drawn] = self.arrived

    def state_dict(self):
        """Return the rollouts' frames and positions, and the random generator's state."""
        return {"generator": self.generator.get_state(), "position": self.position,
                "frames": self.frames.cpu()}

    def load_state_dict(self, state):
        """Restore the state of `state_dict`; with another size or frame shape, start afresh."""
        if state["frames"].shape != self.frames.shape:
            return
        self.generator.set_state(state["generator"])
        self.position = state["position"].clamp(max=int(self.clips[-1]) - 1)
        self.frames = state["frames"].to(self.device)
