"""Times the course template's way of training and predicting against ours, side by side in one process.

    python scripts/benchmark.py                               # demo data, the device Trainer.py would take
    python scripts/benchmark.py --DR data --json speed.json   # the course's data
    python scripts/benchmark.py --precision bf16              # ours in bfloat16, wherever that is slower, too
    python scripts/benchmark.py --compile                     # ours also with torch.compile (minutes of compiling on a CPU)
    python scripts/benchmark.py --only training rollout       # some parts only
    python scripts/benchmark.py --quick                       # tiny sizes: does it run? not a measurement

The template's loop stands below in plain words: float32, NCHW, one label and one frame at a time. It is timed alternately
with `VAE_Model.training_one_step`, `VAE_Model.rollout` and `WindowLoader`, on the same weights and pictures. It prints Markdown
for docs/PERFORMANCE.md, which explains every row. Let nothing else run on the machine meanwhile.
"""

import copy
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.cli import Parser, UserError, number, progress, run  # before PyTorch: utils/__init__.py

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets.folder import default_loader

import Trainer
from utils.options import device_name
from dataloader import Dataset_Dance, Frames, WindowLoader, find_clips, frame_transform, list_pairs, list_test_sequences
from utils.frame_cache import read_image
from utils.hardware import pick_device
from modules import Decoder_Fusion, Gaussian_Predictor, Generator, Label_Encoder, RGB_Encoder

PARTS = ("data", "training", "pool", "rollout", "memory", "growth", "equality")
DEMO_FRAMES, DEMO_SEQUENCE = 320, 64  # the least that the demo data hold
DIMS = dict(F_dim=128, L_dim=32, N_dim=12, D_out_dim=192)
TINY_DIMS = dict(F_dim=16, L_dim=4, N_dim=4, D_out_dim=16)
EPOCH = 23_410  # training frames of the course's data
# how many times as fast as the template's way ours is to be: on a CPU with AVX512-BF16, on any CPU in fp32, on a data center's GPU
TARGETS = {"bf16": {"data": 50, "teacher forcing": 2.5, "own frames": 2.3, "rollout": 2.3},
           "fp32": {"data": 50, "teacher forcing": 1.2, "own frames": 1.2, "rollout": 2.3},
           "cuda": {"data": 50, "teacher forcing": 5, "own frames": 5}}


# ---------------------------------------------------------------- the template's way

class TemplateVideo(Dataset):
    """Windows of frames and poses; every picture is read, resized and converted whenever it is asked for."""

    def __init__(self, root, frame_H, frame_W, video_len):
        self.frames, self.labels = list_pairs(root, "train")
        self.transform = transforms.Compose([transforms.Resize((frame_H, frame_W)), transforms.ToTensor()])
        self.video_len = video_len

    def __len__(self):
        return len(self.frames) // self.video_len

    def __getitem__(self, index):
        imgs, labels = [], []
        for i in range(self.video_len):
            imgs.append(self.transform(default_loader(self.frames[index * self.video_len + i])))
            labels.append(self.transform(default_loader(self.labels[index * self.video_len + i])))
        return torch.stack(imgs), torch.stack(labels)


class TemplateModel(nn.Module):
    """The five networks, driven as the template drives them."""

    def __init__(self, args):
        super().__init__()
        self.frame_transformation = RGB_Encoder(3, args.F_dim)
        self.label_transformation = Label_Encoder(3, args.L_dim)
        self.Gaussian_Predictor = Gaussian_Predictor(args.F_dim + args.L_dim, args.N_dim)
        self.Decoder_Fusion = Decoder_Fusion(args.F_dim + args.L_dim + args.N_dim, args.D_out_dim)
        self.Generator = Generator(args.D_out_dim, 3)
        self.N_dim, self.device = args.N_dim, args.device
        self.to(args.device)
        self.mse_criterion = nn.MSELoss()
        self.optim = torch.optim.Adam(self.parameters(), lr=0.001)

    def loss(self, img, label, adapt_TeacherForcing):
        """Mean squared error and KL, added up over the frames of a window."""
        mse, kl = 0.0, 0.0
        for t in range(1, img.shape[1]):
            previous = img[:, t - 1] if adapt_TeacherForcing or t == 1 else generated
            previous_feature = self.frame_transformation(previous)
            feature = self.frame_transformation(img[:, t])
            pose = self.label_transformation(label[:, t])
            z, mu, logvar = self.Gaussian_Predictor(feature, pose)
            generated = self.Generator(self.Decoder_Fusion(previous_feature, pose, z))
            mse = mse + self.mse_criterion(generated, img[:, t])
            kl = kl + -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / img.shape[0]
        return mse + kl

    def training_one_step(self, img, label, adapt_TeacherForcing):
        img, label = img.to(self.device), label.to(self.device)
        loss = self.loss(img, label, adapt_TeacherForcing)
        self.optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optim.step()
        return loss.detach().cpu()  # the template's bar shows it at every step

    @torch.no_grad()
    def rollout(self, first, label, z="prior"):
        """Sequences (S, T - 1, 3, H, W) from first frames (S, 3, H, W) and poses (S, T, 3, H, W), one after the other.

        Frames are clamped before they are fed back, as ours are, so that both make the same ones.
        """
        sequences = []
        for start, poses in zip(first, label):
            poses, previous, frames = poses[None].to(self.device), start[None].to(self.device), []
            for t in range(1, poses.shape[1]):
                feature = self.frame_transformation(previous)
                pose = self.label_transformation(poses[:, t])
                shape = (1, self.N_dim, *previous.shape[2:])
                noise = torch.randn(shape, device=self.device) if z == "prior" else torch.zeros(shape, device=self.device)
                previous = self.Generator(self.Decoder_Fusion(feature, pose, noise)).clamp(0, 1)
                frames.append(previous.cpu())
            sequences.append(torch.cat(frames))
        return torch.stack(sequences)


# ---------------------------------------------------------------- ours

def our_model(args, recipe="template", **flags):
    """Our VAE_Model with the benchmark's device, precision and sizes."""
    words = ["--recipe", recipe, "--device", args.device, "--precision", args.precision, "--kl_anneal_type", "None"]
    for name in (*DIMS, "frame_H", "frame_W"):
        words += [f"--{name}", str(getattr(args, name))]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return Trainer.VAE_Model(Trainer.build_parser().parse_args(words))


def template_model(args, model):
    """The template's loop with a copy of our model's weights."""
    template = TemplateModel(args)
    template.load_state_dict({name: value.contiguous() for name, value in model.network_state().items()}, strict=True)
    return template


def compiled(args, **flags):
    """Our model with its networks compiled, as Trainer.py does it on CUDA."""
    model = our_model(args, **flags)
    model.mark_for_compiling()
    return model


# ---------------------------------------------------------------- timing

@contextmanager
def plain_cuda():
    """Inside, the settings that PyTorch starts with, which the template never touches. They cost nothing on a CPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.benchmark = False, False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.benchmark = before


class OperationCounter(TorchDispatchMode):
    """Counts PyTorch's operations that compute something, views aside; on a GPU each is launched by the host, once or a few times."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def wait(device):
    """Let a GPU finish, so that a clock reads the work and not its launch."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Bench:
    """What every part needs: the flags, the pictures, the bar, and where the figures go."""

    def __init__(self, args, root, folder):
        self.args, self.root, self.folder = args, root, folder
        self.timings, self.extra, self.bar = [], {}, None
        self.precision = our_model(args).precision
        self.peak = None
        self.pairs = list_pairs(root, "train")
        self.count = len(self.pairs[0])
        self.targets = TARGETS["cuda" if args.device.startswith("cuda") else "fp32" if self.precision == "fp32" else "bf16"]

    def windows(self, batch, length, shape=None):
        """Frames and poses (batch, length, 3, H, W), float32 in [0, 1], from the start of the training data, over and over."""
        H, W = shape or (self.args.frame_H, self.args.frame_W)
        transform, index = frame_transform(H, W), [i % self.count for i in range(batch * length)]
        pictures = [torch.stack([transform(read_image(paths[i])) for i in sorted(set(index))]) for paths in self.pairs]
        return tuple(p[torch.tensor(index)].unflatten(0, (batch, length)) for p in pictures)

    def alternate(self, name, ways, frames=0, target=None, runs=None):
        """Time the ways {label: function of no arguments} in turn, A B A B ..., after one call of each that is not counted.

        frames: how many frames a call works through. target: what "ours" is to reach, in times as fast as "template".
        A way that fails (torch.compile without a compiler) is left out with a line that says so.
        """
        seconds, first = {label: [] for label in ways}, {}
        for turn in range((runs or self.args.runs) + 1):
            for label in list(seconds):
                began = time.perf_counter()
                try:
                    with plain_cuda() if label == "template" else nullcontext():
                        ways[label]()
                        wait(self.args.device)
                except Exception as error:
                    if label != "compiled":
                        raise
                    print(f"{name}: torch.compile does not work here ({type(error).__name__})", file=sys.stderr)
                    del seconds[label]
                    continue
                spent = time.perf_counter() - began
                self.advance(name)
                if turn:
                    seconds[label].append(spent)
                else:
                    first[label] = spent
        row = {"name": name, "frames": frames, "target": target, "seconds": seconds, "first_call": first}
        row["median"] = {label: statistics.median(values) for label, values in seconds.items()}
        row["times_as_fast"] = {
            label: {"median": row["median"]["template"] / row["median"][label], "min": min(pairs), "max": max(pairs)}
            for label in seconds if label != "template" and "template" in seconds
            for pairs in [[a / b for a, b in zip(seconds["template"], seconds[label])]]}
        self.timings.append(row)
        return row

    def advance(self, name):
        """Another call is done: say so on the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(name, refresh=False)
            self.bar.update()

    # ------------------------------------------------------------ the parts

    def data(self):
        """Reading an epoch of windows onto the device."""
        args = self.args
        workers = min(4, os.cpu_count() or 1)  # the template's 4, where there are cores for them
        template = DataLoader(TemplateVideo(self.root, args.frame_H, args.frame_W, args.train_vi_len), args.batch_size,
                              num_workers=workers, drop_last=True)

        def read(loader):
            for img, label in loader:
                img.to(args.device), label.to(args.device)

        began = time.perf_counter()
        frames = Frames(self.root, "train", args.frame_H, args.frame_W, self.folder, workers).to(args.device)
        self.extra["seconds of decoding once"] = time.perf_counter() - began
        ours = WindowLoader(Dataset_Dance(self.root, None, "train", args.train_vi_len, frames=frames), args.batch_size)
        a, b = next(iter(template)), next(iter(ours))
        self.extra["batches are equal to the bit"] = all(torch.equal(x, y.cpu()) for x, y in zip(a, b))
        count = len(ours) * args.batch_size * args.train_vi_len
        self.alternate(f"data: an epoch of {count} frames", {"template": lambda: read(template), "ours": lambda: read(ours)}, count,
                       self.targets["data"])

    def training(self):
        """Steps with teacher forcing and without, and the arithmetic in them."""
        args = self.args
        img, label = self.windows(args.batch_size, args.train_vi_len)
        ours = our_model(args)
        models = {"template": template_model(args, ours), "ours": ours}
        if args.compile:
            models["compiled"] = compiled(args)
        for forced, name in ((True, "teacher forcing"), (False, "own frames")):
            ways = {who: lambda model=model: model.training_one_step(img, label, forced) for who, model in models.items()}
            row = self.alternate(f"training, {name}, batch {args.batch_size}, window {args.train_vi_len}", ways,
                                 args.batch_size * (args.train_vi_len - 1), self.targets[name])
            self.count_work(row, models, lambda model: model.training_one_step(img, label, forced))

    def pool(self):
        """The step of the recipe that Trainer.py trains with by default: lanes drawn, one frame predicted, lanes put back."""
        args = self.args
        frames = Frames(self.root, "train", args.frame_H, args.frame_W, self.folder).to(args.device)
        clips = find_clips(frames.imgs.cpu().numpy())

        def with_lanes(model):
            model.pool = Trainer.RolloutPool(Dataset_Dance(self.root, None, "train", 2, frames=frames), clips, 16, 0, args.device)
            model.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
            return model

        def step(model, length=2):
            batch = model.args.batch_size
            img, label = model.pool.draw(batch, length, 0.5, torch.zeros(batch, dtype=torch.bool))
            model.training_one_step(img, label, torch.zeros(length, dtype=torch.bool))
            model.pool.put(model.generated)

        ours = with_lanes(our_model(args, "pool"))
        template, batch = template_model(args, ours), ours.args.batch_size
        img, label = self.windows(batch, 2)
        ways = {"template": lambda: template.training_one_step(img, label, True), "ours": lambda: step(ours)}
        if args.compile:
            fast = with_lanes(compiled(args, recipe="pool"))
            ways["compiled"] = lambda: step(fast)
        row = self.alternate(f"training, pool recipe, batch {batch}, window 2", ways, batch, runs=4 * args.runs)
        self.count_work(row, {"template": template, "ours": ours},
                        lambda model: model.training_one_step(img, label, True) if model is template else step(model))

    def rollout(self):
        """Five sequences from their first frames and poses."""
        args = self.args
        transform, length = frame_transform(args.frame_H, args.frame_W), args.rollout_frames + 1
        sequences = list_test_sequences(self.root)[:5]
        length = min(length, *(len(poses) for _, poses in sequences))
        first = torch.stack([transform(read_image(frame)) for frame, _ in sequences])
        label = torch.stack([torch.stack([transform(read_image(path)) for path in poses[:length]]) for _, poses in sequences])
        ours = our_model(args)
        models = {"template": template_model(args, ours), "ours": ours}
        for model in models.values():
            nn.Module.train(model, False)
        if args.compile:
            models["compiled"] = compiled(args)
        ways = {who: lambda model=model: model.rollout(first, label) for who, model in models.items()}
        count = len(first) * (length - 1)
        row = self.alternate(f"rollout of {len(first)} sequences, {length - 1} frames each", ways, count, self.targets.get("rollout"))
        self.count_work(row, models, lambda model: model.rollout(first, label))

    def count_work(self, row, models, work):
        """Add to a row the arithmetic of one call, the share of the measured matmul peak it ran at, and the operations it is made of."""
        row["gflop"], row["share_of_peak"], row["operations"] = {}, {}, {}
        if self.peak is None:
            kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
            with plain_cuda():
                self.peak = {"fp32": matmul_peak(torch.float32, self.args.device)}
            if self.precision != "fp32":
                self.peak[self.precision] = matmul_peak(kind[self.precision], self.args.device)
            if self.args.device.startswith("cuda"):  # PyTorch's default for convolutions, and so the template's
                self.peak["tf32"] = matmul_peak(torch.float32, self.args.device)
        for who in ("template", "ours"):
            with FlopCounterMode(display=False) as counter, OperationCounter() as operations:
                work(models[who])
            row["gflop"][who] = counter.get_total_flops() / 1e9
            row["operations"][who] = operations.count
        row["gflop"]["compiled"] = row["gflop"]["ours"]
        for who, median in row["median"].items():
            used = "fp32" if who == "template" else self.precision
            if used == "fp32" and "tf32" in self.peak:
                used = "tf32"
            row["share_of_peak"][who] = row["gflop"][who] / median / self.peak[used]

    def memory(self):
        """Peak memory that one training step adds, in a fresh process for each (in this one on CUDA)."""
        args, rows = self.args, []
        for who, length in self.memory_cases():
            measure = memory_of if args.device.startswith("cuda") else memory_in_a_process
            rows.append({"who": who, "window": length, "MB": measure(args, who, length)})
            self.advance(f"memory, window {length}")
        self.extra["memory"] = rows

    def memory_cases(self):
        """Whose step, at which window."""
        T = self.args.train_vi_len
        lengths = [T] if self.args.quick else [T // 2, T, 2 * T]
        return [("template", T)] + [(who, length) for who in ("ours", "ours with --checkpoint_steps") for length in lengths]

    def growth(self):
        """How a step of ours takes longer with batch, window and frame size, and the batch that trains most frames a second."""
        args = self.args
        model, rows, known = our_model(args), [], {}
        for what, value, (b, t, h, w) in self.sizes():
            if (b, t, h, w) not in known:
                img, label = self.windows(b, t, (h, w))
                ways = {f"ours, {name}": lambda forced=forced: model.training_one_step(img, label, forced)
                        for name, forced in (("teacher forcing", True), ("own frames", False))}
                try:
                    with Trainer.enough_memory("growth", "smaller sizes"):
                        row = self.alternate(f"growth, batch {b}, window {t}, frame {h}x{w}", ways, runs=max(1, args.runs // 2))
                except UserError:
                    print(f"growth: no room for batch {b}, window {t}, frame {h}x{w}", file=sys.stderr)
                    model.optim.zero_grad(set_to_none=True)
                    continue
                self.timings.remove(row)
                known[b, t, h, w] = list(row["median"].values())
            rows.append({"what": what, "value": value, "batch": b, "window": t, "frame": f"{h}x{w}", "frames": b * (t - 1),
                         "teacher forcing": known[b, t, h, w][0], "own frames": known[b, t, h, w][1]})
        self.extra["growth"] = rows

    def sizes(self):
        """What grows: (name, value, (batch, window, height, width)), around the size that is asked for; on a GPU far beyond its batch."""
        B, T, H, W = self.args.batch_size, self.args.train_vi_len, self.args.frame_H, self.args.frame_W
        factors = (0.5, 1, 2, 4) + ((8, 16, 32) if self.args.device.startswith("cuda") else ())
        cases = [("batch", batch, (batch, T, H, W)) for batch in (int(B * factor) for factor in factors) if batch]
        cases += [("window", length, (B, length, H, W)) for length in sorted({2, T // 4, T // 2, T, 2 * T} - {0, 1})]
        cases += [("frame", f"{h}x{w}", (B, T, h, w)) for h, w in ((H // 2, W // 2), (H, W), (2 * H, 2 * W))]
        return cases

    def best_batch(self):
        """The lines that say which batch trains most frames a second, and how many times the template's at the benchmark's own batch."""
        lines, batches = [], [row for row in self.extra["growth"] if row["what"] == "batch"]
        for name in ("teacher forcing", "own frames") if batches else ():
            best = max(batches, key=lambda row: row["frames"] / row[name])
            rate = best["frames"] / best[name]
            lines.append(f"Most frames a second, {name}: {rate:.1f} at batch {best['batch']}; an epoch of {EPOCH:,} frames takes {EPOCH / rate:,.1f} s.")
            theirs = next((row for row in self.timings if row["name"].startswith(f"training, {name}")), None)
            if theirs:
                lines[-1] += f" {rate * theirs['median']['template'] / theirs['frames']:.2f} times the template's way at batch {self.args.batch_size}."
        return lines

    def equality(self):
        """Losses, gradients and frames of both ways in float32, with BatchNorm on running statistics and the same noise."""
        args, rows = copy.copy(self.args), {}
        args.precision = "fp32"
        img, label = (x.to(args.device) for x in self.windows(args.batch_size, args.train_vi_len))
        ours = our_model(args, z="zero")  # made before TF32 is switched off: making one switches it on
        template = template_model(args, ours)
        with plain_cuda(), exact_convolutions():
            for model in (ours, template):
                nn.Module.train(model, False)
            steps = args.train_vi_len - 1
            noise = torch.randn(steps * args.batch_size, args.N_dim, args.frame_H, args.frame_W, device=args.device)
            for forced, name in ((True, "teacher forcing"), (False, "own frames")):
                for model in (ours, template):
                    same_noise(model.Gaussian_Predictor, noise)
                loss, *_ = ours(img, label, forced)
                theirs = template.loss(img, label, forced) / steps  # ours is the mean over the frames
                rows[f"loss, {name}"] = abs(loss - theirs).item() / abs(theirs).item()
                pairs = [torch.autograd.grad(value, list(model.parameters())) for value, model in ((loss, ours), (theirs, template))]
                norm = torch.stack([b.norm() for b in pairs[1]]).norm()
                rows[f"gradient, {name}"] = (torch.stack([(a - b).norm() for a, b in zip(*pairs)]).norm() / norm).item()
            few = min(4, args.train_vi_len)
            frames = [ours.rollout(img[:, 0], label[:, :few]), template.rollout(img[:, 0], label[:, :few], "zero")]
            rows["rollout, largest difference of a value in [0, 1]"] = (frames[0] - frames[1]).abs().max().item()
        self.extra["equality"] = rows


@contextmanager
def exact_convolutions():
    """Inside, convolutions on CUDA keep the whole float32: TF32 would hide what is compared."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def same_noise(predictor, noise):
    """Let the predictor take its noise from rows of `noise`, in order, however many it asks for at a time."""
    taken = 0

    def reparameterize(mu, logvar):
        nonlocal taken
        taken += len(mu)
        return mu + torch.exp(0.5 * logvar) * noise[taken - len(mu):taken]

    predictor.reparameterize = reparameterize


def matmul_peak(dtype, device):
    """The highest rate of a matrix product found here, in GFLOP/s: several sizes, the best of several runs."""
    best = 0.0
    for size in (512, 1024, 2048) + ((4096, 8192) if device.startswith("cuda") else ()):
        a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(8):
            wait(device)
            began = time.perf_counter()
            a @ b
            wait(device)
            best = max(best, 2 * size ** 3 / (time.perf_counter() - began) / 1e9)
    return best


# ---------------------------------------------------------------- peak memory

def highest_memory():
    """The most memory this process had so far, in MB."""
    try:  # ru_maxrss of a child starts at what its parent had; this line of Linux does not
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e3
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def memory_of(args, who, length):
    """The memory in MB that a first training step (without teacher forcing) adds at its peak: activations, gradients, optimizer."""
    ours = our_model(args, **({"checkpoint_steps": True} if who.endswith("checkpoint_steps") else {}))
    model = template_model(args, ours) if who == "template" else ours
    del ours
    img, label = torch.rand(2, args.batch_size, length, 3, args.frame_H, args.frame_W)
    cuda = args.device.startswith("cuda")
    if cuda:
        gc.collect()  # models of earlier parts
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    before = torch.cuda.memory_allocated(args.device) / 1e6 if cuda else highest_memory()
    with plain_cuda():  # trying out convolutions takes memory of its own
        model.training_one_step(img, label, False)
    return (torch.cuda.max_memory_allocated(args.device) / 1e6 if cuda else highest_memory()) - before


def memory_in_a_process(args, who, length):
    """memory_of in a Python of its own, as a process keeps memory that it once had."""
    settings = {**vars(args), "json": None}
    code = "import argparse, json, sys; sys.path[:0] = [sys.argv[1]]; import benchmark as b; " \
           "print(b.memory_of(argparse.Namespace(**json.loads(sys.argv[2])), sys.argv[3], int(sys.argv[4])))"
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), json.dumps(settings), who, str(length)],
                          check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


# ---------------------------------------------------------------- the machine and the tables

def machine(device):
    """What the figures belong to."""
    name = platform.processor() or platform.machine()
    try:
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    words = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_tile": "_is_amx_tile_supported"}
    isa = [torch.backends.cpu.get_cpu_capability()] + [word for word, ask in words.items() if getattr(torch.cpu, ask, bool)()]
    found = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": " ".join(isa),
             "torch": torch.__version__, "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        found["gpu"] = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    return found


def seconds_text(values):
    """Median (min-max), in a unit that suits it."""
    unit, scale = ("ms", 1e3) if statistics.median(values) < 0.1 else ("s", 1)
    middle, low, high = (f"{x * scale:.3g}" for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} {unit} ({low}-{high})"


def markdown(bench):
    """The tables of docs/PERFORMANCE.md, as lines."""
    args, extra = bench.args, bench.extra
    lines = ["", "| machine | |", "| --- | --- |"] + [f"| {k} | {v} |" for k, v in machine(args.device).items()]
    lines += [f"| ours in | {bench.precision} |", f"| timed runs a row | {args.runs} |"]
    lines += [f"| matmul peak, {name} | {peak:,.0f} GFLOP/s |" for name, peak in (bench.peak or {}).items()]
    if bench.timings:
        lines += ["", "| work | template-style | ours | times as fast | target |", "| --- | --- | --- | --- | --- |"]
    for row in bench.timings:
        for who, ratio in row["times_as_fast"].items():
            target = row["target"] if row["target"] and who == "ours" else ""
            lines.append(f"| {row['name']}{' (compiled)' if who == 'compiled' else ''} | {seconds_text(row['seconds']['template'])} "
                         f"| {seconds_text(row['seconds'][who])} | {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) | {target} |")
    counted = [row for row in bench.timings if "gflop" in row]
    if counted:
        lines += ["", "| work | whose | frames/s | GFLOP a call | share of matmul peak | operations |", "| --- | --- | --- | --- | --- | --- |"]
    for row in counted:
        for who, median in row["median"].items():
            lines.append(f"| {row['name']} | {who} | {row['frames'] / median:.1f} | {row['gflop'][who]:.3g} | {row['share_of_peak'][who]:.0%} "
                         f"| {format(row['operations'][who], ',') if who in row['operations'] else ''} |")
    if "memory" in extra:
        lines += ["", f"| peak memory of a training step, batch {args.batch_size} | window | MB |", "| --- | --- | --- |"]
        lines += [f"| {row['who']} | {row['window']} | {row['MB']:.0f} |" for row in extra["memory"]]
    if "growth" in extra:
        lines += ["", "| ours, growing | batch | window | frame | teacher forcing, s | own frames, s | ms a frame | ms a frame |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {row['what']} {row['value']} | {row['batch']} | {row['window']} | {row['frame']} | {row['teacher forcing']:.3g} | {row['own frames']:.3g} "
                  f"| {1e3 * row['teacher forcing'] / row['frames']:.3g} | {1e3 * row['own frames'] / row['frames']:.3g} |" for row in extra["growth"]]
        lines += ["", *bench.best_batch()]
    if "equality" in extra:
        lines += ["", "| equality in fp32, BatchNorm on running statistics | relative difference |", "| --- | --- |"]
        lines += [f"| {name} | {value:.1e} |" for name, value in extra["equality"].items()]
    if "seconds of decoding once" in extra:
        lines += ["", f"The first epoch decodes {bench.count} frames and poses once: {extra['seconds of decoding once']:.1f} s. "
                  f"Batches are {'equal to the bit' if extra['batches are equal to the bit'] else 'NOT EQUAL'}."]
    return lines + (["", "--quick: tiny sizes, so these figures say nothing about speed."] if args.quick else [])


# ---------------------------------------------------------------- the command line

def build_parser():
    parser = Parser(description="Time the template's way of training and predicting against ours, side by side.")
    parser.add_argument("--DR", metavar="DIR", help="data folder (None: demo data are drawn into a temporary folder)")
    parser.add_argument("--device", type=device_name, metavar="DEVICE", help="cuda, cuda:N or cpu (None: cuda where there is one, else cpu)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="ours; the template's way is always fp32")
    parser.add_argument("--compile", action="store_true", help="also time ours with torch.compile (always on CUDA, where Trainer.py compiles)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="parts to run: " + ", ".join(PARTS))
    parser.add_argument("--runs", type=number(int, 1, 1000), default=5, metavar="N", help="timed runs of each, alternating")
    parser.add_argument("--batch_size", type=number(int, 1, 4096), default=2, metavar="N", help="windows a step")
    parser.add_argument("--train_vi_len", type=number(int, 4, 1024), default=16, metavar="N", help="frames of a window")
    parser.add_argument("--rollout_frames", type=number(int, 1, 10_000), metavar="N", help="frames to predict of each test sequence (None: 32, on CUDA all 629)")
    parser.add_argument("--frame_H", type=number(int, 8, 4096), default=32, metavar="N", help="height of a frame")
    parser.add_argument("--frame_W", type=number(int, 8, 4096), default=64, metavar="N", help="width of a frame")
    parser.add_argument("--json", metavar="FILE", help="also write every single time into this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes that take seconds: shows that it works, measures nothing")
    return parser


def measure(args, root, folder):
    """Run the parts that were asked for; returns the Bench with their figures."""
    bench = Bench(args, root, folder)
    if bench.count < args.batch_size * args.train_vi_len:
        raise UserError(f"--batch_size {args.batch_size}: {root} holds {bench.count} training frames; expected {args.batch_size} windows of {args.train_vi_len}")
    ways, turns = 2 + args.compile, args.runs + 1
    calls = {"data": 2 * turns, "training": 2 * ways * turns, "pool": ways * (4 * args.runs + 1), "rollout": ways * turns, "memory": len(bench.memory_cases()),
             "growth": 2 * (max(1, args.runs // 2) + 1) * len({size for *_, size in bench.sizes()}), "equality": 0}
    chosen = [part for part in PARTS if part in args.only]
    with progress(total=sum(calls[part] for part in chosen), unit="run", desc="benchmark") as bench.bar:
        for part in chosen:
            getattr(bench, part)()
    return bench


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.device = str(pick_device(args.device))
    cuda = args.device.startswith("cuda")
    args.compile, args.rollout_frames = args.compile or cuda, args.rollout_frames or (629 if cuda else 32)
    for name, value in (TINY_DIMS if args.quick else DIMS).items():
        setattr(args, name, value)
    if args.quick:
        args.train_vi_len, args.rollout_frames, args.frame_H, args.frame_W = 4, 4, 16, 32
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        raise UserError(f"--json {args.json}: expected a file, in a folder that is there")
    warnings.filterwarnings("ignore", message=".*DataLoader will create.*")
    with tempfile.TemporaryDirectory() as folder:  # decoded frames go here too: the first epoch is to be a first one
        root = args.DR
        if root is None:
            root = str(Path(folder) / "demo")
            train, sequence = (64, 6) if args.quick else (DEMO_FRAMES, max(DEMO_SEQUENCE, args.rollout_frames + 1))
            subprocess.run([sys.executable, str(ROOT / "scripts" / "make_demo_data.py"), root, "--train_frames", str(train),
                            "--sequence_frames", str(sequence)], check=True, stdout=sys.stderr)
        bench = measure(args, root, folder)
        print("\n".join(markdown(bench)))
    if args.json:
        everything = {"machine": machine(args.device), "settings": vars(args), "precision": bench.precision, "matmul_peak_gflops": bench.peak,
                      "timings": bench.timings, **bench.extra}
        Path(args.json).write_text(json.dumps(everything, indent=1) + "\n")
        print(f"\nwritten: {args.json}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
