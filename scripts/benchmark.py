"""Time the course template's way of training and predicting against ours, in one process.

    python scripts/benchmark.py                               # demo data, Trainer.py's device
    python scripts/benchmark.py --DR data --json speed.json   # the course's data
    python scripts/benchmark.py --precision bf16              # ours in bfloat16 in any case
    python scripts/benchmark.py --compile                     # ours also with torch.compile
    python scripts/benchmark.py --only training rollout       # some parts only
    python scripts/benchmark.py --quick                       # tiny sizes: does it run?

The template's way is scripts/reference_loop.py: float32, NCHW, one label and one frame at a time.
It takes turns with `VAE_Model.training_one_step`, `VAE_Model.rollout` and `WindowLoader`, on the
same weights and images. The tables are Markdown for docs/PERFORMANCE.md, which explains every row.
Let nothing else run on the machine meanwhile.
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
from functools import partial
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
from utils import graphs
from utils.options import device_name
from scripts.reference_loop import reference_loss, reference_rollout, reference_step
from dataloader import (
    Dataset_Dance, Frames, RolloutPool, WindowLoader, find_clips, frame_transform, list_pairs,
    list_test_sequences)
from utils.frame_cache import read_image
from utils.averaging import begin_average, network_state
from utils.compiling import is_compiled, mark_for_compiling
from utils.hardware import enough_memory, pick_device
from modules import Decoder_Fusion, Gaussian_Predictor, Generator, Label_Encoder, RGB_Encoder

PARTS = ("data", "training", "pool", "rollout", "memory", "growth", "equality")
DEMO_FRAMES, DEMO_SEQUENCE = 320, 64  # the least that the demo data hold
DIMS = {"F_dim": 128, "L_dim": 32, "N_dim": 12, "D_out_dim": 192}
TINY_DIMS = {"F_dim": 16, "L_dim": 4, "N_dim": 4, "D_out_dim": 16}
EPOCH = 23_410  # training frames of the course's data
# how many times as fast as the template's way ours is to be: on a CPU with AVX512-BF16, on any CPU
# in fp32, on a data center's GPU
TARGETS = {"bf16": {"data": 50, "teacher forcing": 2.5, "free running": 2.3, "pool": 2.1,
                    "rollout": 2.3},
           "fp32": {"data": 50, "teacher forcing": 1.2, "free running": 1.2, "rollout": 2.3},
           "cuda": {"data": 50, "teacher forcing": 5, "free running": 5}}


# ---------------------------------------------------------------- the template's way

class TemplateVideo(Dataset):
    """Hold windows of frames and poses; read, resize and convert an image whenever it is used."""

    def __init__(self, root, frame_H, frame_W, video_len):
        self.frames, self.labels = list_pairs(root, "train")
        self.transform = transforms.Compose(
            [transforms.Resize((frame_H, frame_W)), transforms.ToTensor()])
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
    """Drive the five networks as the template does: by scripts/reference_loop.py."""

    def __init__(self, args):
        super().__init__()
        self.frame_transformation = RGB_Encoder(3, args.F_dim)
        self.label_transformation = Label_Encoder(3, args.L_dim)
        self.Gaussian_Predictor = Gaussian_Predictor(args.F_dim + args.L_dim, args.N_dim)
        self.Decoder_Fusion = Decoder_Fusion(args.F_dim + args.L_dim + args.N_dim, args.D_out_dim)
        self.Generator = Generator(args.D_out_dim, 3)
        self.N_dim, self.device = args.N_dim, args.device
        self.to(args.device)
        self.optim = torch.optim.Adam(self.parameters(), lr=0.001)

    def training_one_step(self, img, label, teacher_forced):
        img, label = img.to(self.device), label.to(self.device)
        loss = reference_step(self, self.optim, img, label, teacher_forced)
        return loss.cpu()  # the template's bar shows it at every step

    def rollout(self, first, label, draw=torch.randn):
        """Roll out sequences one after the other: first (S, 3, H, W), label (S, T, 3, H, W).

        Frames are clamped before they are fed back, as ours are, so that both make the same ones.
        """
        first, label = first.to(self.device), label.to(self.device)
        return torch.cat([reference_rollout(self, start, poses, self.N_dim, draw).cpu()
                          for start, poses in zip(first.split(1), label.split(1))])


# ---------------------------------------------------------------- ours

def our_model(args, recipe="template", **flags):
    """Return our VAE_Model with the benchmark's device, precision and sizes."""
    words = ["--recipe", recipe, "--device", args.device, "--precision", args.precision,
             "--kl_anneal_type", "None"]
    for name in (*DIMS, "frame_H", "frame_W"):
        words += [f"--{name}", str(getattr(args, name))]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return Trainer.VAE_Model(Trainer.build_parser().parse_args(words))


def template_model(args, model):
    """Return the template's loop with a copy of our model's weights."""
    template = TemplateModel(args)
    weights = {name: value.contiguous() for name, value in network_state(model).items()}
    template.load_state_dict(weights, strict=True)
    return template


def compiled(args, **flags):
    """Return our model with its networks compiled, as --compile does it without graphs."""
    model = our_model(args, **flags)
    mark_for_compiling(model)
    return model


def with_pool(model, dataset, clips):
    """Give a model what training in the pool recipe has: 16 rollouts and averaged weights."""
    model.state.pool = RolloutPool(dataset, clips, 16, 0, model.device)
    begin_average(model)
    return model


def pool_step(model):
    """Take a training step of the pool recipe: draw rollouts, predict a frame of each, put back."""
    batch, length = model.args.batch_size, model.args.train_vi_len
    img, label = model.state.pool.draw(batch, length, 0.5, torch.zeros(batch, dtype=torch.bool))
    model.training_one_step(img, label, torch.zeros(length, dtype=torch.bool))
    model.state.pool.put(model.generated)


def compiled_pool_step(model):
    """Take a `pool_step` of a model of `compiled`; the first compiles and records it."""
    pool_step(model)
    if is_compiled(model):
        graphs.record_step(model, Trainer.VAE_Model)


# ---------------------------------------------------------------- timing

@contextmanager
def plain_cuda():
    """Use the settings that PyTorch starts with; the template never touches them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.benchmark = False, False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.benchmark = before


class OperationCounter(TorchDispatchMode):
    """Count PyTorch's operations, views aside; on a GPU the host launches each."""

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
    """Hold what every part needs: the flags, the images, the bar, and where the figures go."""

    def __init__(self, args, root, folder):
        self.args, self.root, self.folder = args, root, folder
        self.timings, self.extra, self.bar = [], {}, None
        self.precision = our_model(args).precision
        self.peak = None
        self.pairs = list_pairs(root, "train")
        self.count = len(self.pairs[0])
        kind = "fp32" if self.precision == "fp32" else "bf16"
        self.targets = TARGETS["cuda" if args.device.startswith("cuda") else kind]

    def windows(self, batch, length, shape=None):
        """Return the first frames and poses, cycled: (batch, length, 3, H, W), in [0, 1]."""
        H, W = shape or (self.args.frame_H, self.args.frame_W)
        transform, index = frame_transform(H, W), [i % self.count for i in range(batch * length)]
        images = [torch.stack([transform(read_image(paths[i])) for i in sorted(set(index))])
                  for paths in self.pairs]
        return tuple(x[torch.tensor(index)].unflatten(0, (batch, length)) for x in images)

    def alternate(self, name, ways, frames=0, target=None, runs=None):
        """Time the ways {label: function without arguments} alternately: A B A B ...

        The first call of each does not count. frames: how many frames a call works
        through. target: how many times as fast as "template" "ours" is to be. Where torch.compile
        does not work, "compiled" is left out with a warning.
        """
        seconds, first = {label: [] for label in ways}, {}
        for call in range((runs or self.args.runs) + 1):
            for label in list(seconds):
                began = time.perf_counter()
                try:
                    with plain_cuda() if label == "template" else nullcontext():
                        ways[label]()
                        wait(self.args.device)
                except Exception as error:
                    if label != "compiled":
                        raise
                    print(f"{name}: torch.compile does not work here ({type(error).__name__})",
                          file=sys.stderr)
                    del seconds[label]
                    continue
                spent = time.perf_counter() - began
                self.advance(name)
                if call:
                    seconds[label].append(spent)
                else:
                    first[label] = spent
        row = {"name": name, "frames": frames, "target": target, "seconds": seconds,
               "first_call": first}
        row["median"] = {label: statistics.median(values) for label, values in seconds.items()}
        row["times_as_fast"] = {}
        others = [label for label in seconds if label != "template"]
        for label in others if "template" in seconds else ():
            pairs = [a / b for a, b in zip(seconds["template"], seconds[label])]
            row["times_as_fast"][label] = {
                "median": row["median"]["template"] / row["median"][label],
                "min": min(pairs), "max": max(pairs)}
        self.timings.append(row)
        return row

    def advance(self, name):
        """Show on the bar that another call is done."""
        if self.bar is not None:
            self.bar.set_postfix_str(name, refresh=False)
            self.bar.update()

    # ------------------------------------------------------------ the parts

    def data(self):
        """Time reading an epoch of windows onto the device."""
        args = self.args
        workers = min(4, os.cpu_count() or 1)  # the template's 4, where there are cores for them
        length = args.train_vi_len
        video = TemplateVideo(self.root, args.frame_H, args.frame_W, length)
        template = DataLoader(video, args.batch_size, num_workers=workers, drop_last=True)

        def read(loader):
            for img, label in loader:
                img.to(args.device), label.to(args.device)

        began = time.perf_counter()
        frames = Frames(self.root, "train", args.frame_H, args.frame_W, self.folder, workers)
        frames = frames.to(args.device)
        self.extra["seconds of decoding once"] = time.perf_counter() - began
        dataset = Dataset_Dance(self.root, None, "train", length, frames=frames)
        ours = WindowLoader(dataset, args.batch_size)
        equal = [torch.equal(x, y.cpu()) for x, y in zip(next(iter(template)), next(iter(ours)))]
        self.extra["batches are bitwise identical"] = all(equal)
        count = len(ours) * args.batch_size * length
        ways = {"template": lambda: read(template), "ours": lambda: read(ours)}
        self.alternate(f"data: an epoch of {count} frames", ways, count, self.targets["data"])

    def training(self):
        """Time steps with teacher forcing and without, and count the arithmetic in them."""
        args = self.args
        img, label = self.windows(args.batch_size, args.train_vi_len)
        ours = our_model(args)
        models = {"template": template_model(args, ours), "ours": ours}
        if args.compile:
            models["compiled"] = compiled(args)
        for forced, name in ((True, "teacher forcing"), (False, "free running")):
            def step(model, forced=forced):
                model.training_one_step(img, label, forced)

            row = self.alternate(
                f"training, {name}, batch {args.batch_size}, window {args.train_vi_len}",
                {who: partial(step, model) for who, model in models.items()},
                args.batch_size * (args.train_vi_len - 1), self.targets[name])
            self.count_work(row, models, step)

    def pool(self):
        """Time the default recipe's step: draw rollouts, predict a frame of each, put back."""
        args = self.args
        frames = Frames(self.root, "train", args.frame_H, args.frame_W, self.folder)
        frames = frames.to(args.device)
        clips = find_clips(frames.imgs.cpu().numpy())
        dataset = Dataset_Dance(self.root, None, "train", 2, frames=frames)
        ours = with_pool(our_model(args, "pool"), dataset, clips)
        template, batch = template_model(args, ours), ours.args.batch_size
        img, label = self.windows(batch, 2)
        ways = {"template": lambda: template.training_one_step(img, label, True),
                "ours": lambda: pool_step(ours)}
        if args.compile:
            fast = with_pool(compiled(args, recipe="pool"), dataset, clips)
            ways["compiled"] = lambda: compiled_pool_step(fast)
        counted = dict(ways)
        if args.device.startswith("cuda"):
            graphs.record_step(ours, Trainer.VAE_Model)
            plain = with_pool(our_model(args, "pool"), dataset, clips)
            counted["ours"] = ways["single calls"] = lambda: pool_step(plain)
        row = self.alternate(f"training, pool recipe, batch {batch}, window 2", ways, batch,
                             self.targets.get("pool"), runs=4 * args.runs)
        self.count_work(row, counted, lambda way: way())

    def rollout(self):
        """Time the rollout of five sequences from their first frames and poses."""
        args = self.args
        transform, length = frame_transform(args.frame_H, args.frame_W), args.rollout_frames + 1
        sequences = list_test_sequences(self.root)[:5]
        length = min(length, *(len(poses) for _, poses in sequences))
        first = torch.stack([transform(read_image(frame)) for frame, _ in sequences])
        label = torch.stack([torch.stack([transform(read_image(path)) for path in poses[:length]])
                             for _, poses in sequences])
        ours = our_model(args)
        models = {"template": template_model(args, ours), "ours": ours}
        for model in models.values():
            nn.Module.train(model, False)
        if args.compile:
            models["compiled"] = compiled(args)
        ways = {who: partial(model.rollout, first, label) for who, model in models.items()}
        row = self.alternate(f"rollout of {len(first)} sequences, {length - 1} frames each", ways,
                             len(first) * (length - 1), self.targets.get("rollout"))
        self.count_work(row, models, lambda model: model.rollout(first, label))

    def count_work(self, row, models, work):
        """Add to a row one call's arithmetic, its share of the matmul peak, and its operations."""
        row["gflop"], row["share_of_peak"], row["operations"] = {}, {}, {}
        self.peak = self.peak or self.measure_peaks()
        for who in ("template", "ours"):
            flops, operations = FlopCounterMode(display=False), OperationCounter()
            with graphs.plain_calls(), flops, operations:  # no rollout as a graph: it hides them
                work(models[who])
            row["gflop"][who] = flops.get_total_flops() / 1e9
            row["operations"][who] = operations.count
        row["gflop"]["compiled"] = row["gflop"]["single calls"] = row["gflop"]["ours"]
        for who, median in row["median"].items():
            used = "fp32" if who == "template" else self.precision
            if used == "fp32" and "tf32" in self.peak:
                used = "tf32"
            row["share_of_peak"][who] = row["gflop"][who] / median / self.peak[used]

    def measure_peaks(self):
        """Measure the matmul peak of each precision that a row needs, in GFLOP/s."""
        device = self.args.device
        large = (4096, 8192) if device.startswith("cuda") else ()
        sizes = (512,) if self.args.quick else (512, 1024, 2048, *large)
        with plain_cuda():
            peaks = {"fp32": matmul_peak(torch.float32, device, sizes)}
        if self.precision != "fp32":
            kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
            peaks[self.precision] = matmul_peak(kind, device, sizes)
        if device.startswith("cuda"):  # PyTorch's default for convolutions, and so the template's
            peaks["tf32"] = matmul_peak(torch.float32, device, sizes)
        return peaks

    def memory(self):
        """Measure the peak memory of a training step, in a fresh process (on CUDA in this one)."""
        args, rows = self.args, []
        for who, length in self.memory_cases():
            measure = memory_of if args.device.startswith("cuda") else memory_in_a_process
            rows.append({"who": who, "window": length, "MB": measure(args, who, length)})
            self.advance(f"memory, window {length}")
        self.extra["memory"] = rows

    def memory_cases(self):
        """Return whose step is measured, at which window."""
        T = self.args.train_vi_len
        lengths = [T] if self.args.quick else [T // 2, T, 2 * T]
        ours = "ours", "ours with --checkpoint_steps"
        return [("template", T), *((who, length) for who in ours for length in lengths)]

    def growth(self):
        """Time how a step of ours grows with batch, window and frame, and the fastest batch."""
        model, rows, known = our_model(self.args), [], {}
        for what, value, size in self.sizes():
            b, t, h, w = size
            name = f"batch {b}, window {t}, frame {h}x{w}"
            if size not in known:
                img, label = self.windows(b, t, (h, w))
                ways = {forced: partial(model.training_one_step, img, label, forced)
                        for forced in (True, False)}
                try:
                    with enough_memory("growth", "smaller sizes"):
                        row = self.alternate(f"growth, {name}", ways,
                                             runs=max(1, self.args.runs // 2))
                except UserError:
                    print(f"growth: no room for {name}", file=sys.stderr)
                    model.optim.zero_grad(set_to_none=True)
                    continue
                self.timings.remove(row)
                known[size] = row["median"]
            rows.append({"what": what, "value": value, "batch": b, "window": t, "frame": f"{h}x{w}",
                         "frames": b * (t - 1), "teacher forcing": known[size][True],
                         "free running": known[size][False]})
        self.extra["growth"] = rows

    def sizes(self):
        """Return what grows, around the size asked for: (name, value, (batch, window, H, W))."""
        args = self.args
        B, T, H, W = args.batch_size, args.train_vi_len, args.frame_H, args.frame_W
        factors = (0.5, 1, 2, 4) + ((8, 16, 32) if args.device.startswith("cuda") else ())
        batches = [int(B * factor) for factor in factors if B * factor >= 1]
        lengths = sorted({2, T // 4, T // 2, T, 2 * T} - {0, 1})
        frames = (H // 2, W // 2), (H, W), (2 * H, 2 * W)
        return [*(("batch", batch, (batch, T, H, W)) for batch in batches),
                *(("window", length, (B, length, H, W)) for length in lengths),
                *(("frame", f"{h}x{w}", (B, T, h, w)) for h, w in frames)]

    def best_batch(self):
        """Return lines on the batch that trains most frames a second, beside the template's."""
        lines, batches = [], [row for row in self.extra["growth"] if row["what"] == "batch"]
        for name in ("teacher forcing", "free running") if batches else ():
            best = max(batches, key=lambda row: row["frames"] / row[name])
            rate = best["frames"] / best[name]
            lines.append(f"Most frames a second, {name}: {rate:.1f} at batch {best['batch']}; "
                         f"an epoch of {EPOCH:,} frames takes {EPOCH / rate:,.1f} s.")
            for row in self.timings:
                if not row["name"].startswith(f"training, {name}"):
                    continue
                times = rate * row["median"]["template"] / row["frames"]
                lines[-1] += (f" {times:.2f} times the template's way at batch "
                              f"{self.args.batch_size}.")
        return lines

    def equality(self):
        """Compare losses, gradients and frames in float32, BatchNorm on running statistics."""
        args, rows = copy.copy(self.args), {}
        args.precision = "fp32"
        img, label = (x.to(args.device) for x in self.windows(args.batch_size, args.train_vi_len))
        ours = our_model(args, z="zero")  # before TF32 is switched off: making one switches it on
        template = template_model(args, ours)
        with plain_cuda(), exact_convolutions():
            for model in (ours, template):
                nn.Module.train(model, False)
            count = (args.train_vi_len - 1) * args.batch_size
            noise = torch.randn(count, args.N_dim, args.frame_H, args.frame_W, device=args.device)
            for forced, name in ((True, "teacher forcing"), (False, "free running")):
                for model in (ours, template):
                    same_noise(model.Gaussian_Predictor, noise)
                loss = ours(img, label, forced)[0]
                theirs = reference_loss(template, img, label, forced)[0]
                rows[f"loss, {name}"] = abs(loss - theirs).item() / abs(theirs).item()
                mine, other = (torch.autograd.grad(value, list(model.parameters()))
                               for value, model in ((loss, ours), (theirs, template)))
                apart = torch.stack([(a - b).norm() for a, b in zip(mine, other)]).norm()
                norm = torch.stack([b.norm() for b in other]).norm()
                rows[f"gradient, {name}"] = (apart / norm).item()
            first, few = img[:, 0], label[:, :4]
            frames, theirs = ours.rollout(first, few), template.rollout(first, few, torch.zeros)
            largest = (frames - theirs).abs().max().item()
            rows["rollout, largest difference of a value in [0, 1]"] = largest
        self.extra["equality"] = rows


@contextmanager
def exact_convolutions():
    """Keep the whole float32 in convolutions on CUDA: TF32 would hide what is compared."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def same_noise(predictor, noise):
    """Let the predictor take its noise from rows of `noise`, in order, however many at a time."""
    taken = 0

    def reparameterize(mu, logvar):
        nonlocal taken
        taken += len(mu)
        return mu + torch.exp(0.5 * logvar) * noise[taken - len(mu):taken]

    predictor.reparameterize = reparameterize


def matmul_peak(dtype, device, sizes):
    """Return the highest rate of a matrix product here, in GFLOP/s, of several sizes and runs."""
    best = 0.0
    for size in sizes:
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
    """Return the most memory this process had so far, in MB."""
    try:  # ru_maxrss of a child starts at what its parent had; this line of Linux does not
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3
    except (OSError, StopIteration):
        unit = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory_of(args, who, length):
    """Return the MB that a first training step, without teacher forcing, adds at its peak."""
    flags = {"checkpoint_steps": True} if who.endswith("checkpoint_steps") else {}
    ours = our_model(args, **flags)
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
    after = torch.cuda.max_memory_allocated(args.device) / 1e6 if cuda else highest_memory()
    return after - before


def memory_in_a_process(args, who, length):
    """Run memory_of in a Python of its own, as a process keeps memory that it once had."""
    settings = {**vars(args), "json": None}
    code = "import argparse, json, sys; sys.path[:0] = [sys.argv[1]]; import benchmark as b; " \
           "args = argparse.Namespace(**json.loads(sys.argv[2])); " \
           "print(b.memory_of(args, sys.argv[3], int(sys.argv[4])))"
    words = [str(Path(__file__).parent), json.dumps(settings), who, str(length)]
    done = subprocess.run([sys.executable, "-c", code, *words],
                          check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


# ---------------------------------------------------------------- the machine and the tables

def machine(device):
    """Return what the figures belong to: processor, GPU, threads and versions."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    words = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_tile": "_is_amx_tile_supported"}
    isa = [torch.backends.cpu.get_cpu_capability(),
           *(word for word, ask in words.items() if getattr(torch.cpu, ask, bool)())]
    found = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "isa": " ".join(isa), "torch": torch.__version__, "python": platform.python_version(),
             "system": f"{platform.system()} {platform.machine()}"}
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        found["gpu"] = (f"{torch.cuda.get_device_name(device)}, compute capability "
                        f"{major}.{minor}, CUDA {torch.version.cuda}")
    return found


def seconds_text(values):
    """Return median (min-max), in a unit that suits it."""
    unit, scale = ("ms", 1e3) if statistics.median(values) < 0.1 else ("s", 1)
    figures = statistics.median(values), min(values), max(values)
    middle, low, high = (f"{x * scale:.3g}" for x in figures)
    return f"{middle} {unit} ({low}-{high})"


def table(*names):
    """Return the first two lines of a Markdown table, after an empty one."""
    return ["", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def timing_lines(bench):
    """Return the table of times, and the table of the arithmetic in them."""
    if not bench.timings:
        return []
    lines = table("work", "template-style", "ours", "times as fast", "target")
    for row in bench.timings:
        times = {who: seconds_text(seconds) for who, seconds in row["seconds"].items()}
        for who, ratio in row["times_as_fast"].items():
            target = row["target"] if row["target"] and who == "ours" else ""
            lines.append(
                f"| {row['name']}{'' if who == 'ours' else f' ({who})'} "
                f"| {times['template']} | {times[who]} "
                f"| {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) | {target} |")
    counted = [row for row in bench.timings if "gflop" in row]
    if counted:
        lines += table("work", "whose", "frames/s", "GFLOP a call", "share of matmul peak",
                       "operations")
    for row in counted:
        for who, median in row["median"].items():
            operations = f"{row['operations'][who]:,}" if who in row["operations"] else ""
            lines.append(f"| {row['name']} | {who} | {row['frames'] / median:.1f} "
                         f"| {row['gflop'][who]:.3g} | {row['share_of_peak'][who]:.0%} "
                         f"| {operations} |")
    return lines


def growth_lines(bench):
    """Return the table of how a step grows, and the fastest batch."""
    lines = table("ours, growing", "batch", "window", "frame", "teacher forcing, s",
                  "free running, s", "forced, ms a frame", "free, ms a frame")
    for row in bench.extra["growth"]:
        forced, own = row["teacher forcing"], row["free running"]
        lines.append(f"| {row['what']} {row['value']} | {row['batch']} | {row['window']} "
                     f"| {row['frame']} | {forced:.3g} | {own:.3g} "
                     f"| {1e3 * forced / row['frames']:.3g} | {1e3 * own / row['frames']:.3g} |")
    return [*lines, "", *bench.best_batch()]


def markdown(bench):
    """Return the tables of docs/PERFORMANCE.md, as lines."""
    args, extra = bench.args, bench.extra
    lines = table("machine", "") + [f"| {k} | {v} |" for k, v in machine(args.device).items()]
    lines += [f"| ours in | {bench.precision} |", f"| timed runs a row | {args.runs} |"]
    lines += [f"| matmul peak, {name} | {peak:,.0f} GFLOP/s |"
              for name, peak in (bench.peak or {}).items()]
    lines += timing_lines(bench)
    if "memory" in extra:
        lines += table(f"peak memory of a training step, batch {args.batch_size}", "window", "MB")
        lines += [f"| {row['who']} | {row['window']} | {row['MB']:.0f} |"
                  for row in extra["memory"]]
    if "growth" in extra:
        lines += growth_lines(bench)
    if "equality" in extra:
        lines += table("equality in fp32, BatchNorm on running statistics", "relative difference")
        lines += [f"| {name} | {value:.1e} |" for name, value in extra["equality"].items()]
    if "seconds of decoding once" in extra:
        equal = "bitwise identical" if extra["batches are bitwise identical"] else "NOT EQUAL"
        lines += ["", f"The first epoch decodes {bench.count} frames and poses once: "
                      f"{extra['seconds of decoding once']:.1f} s. Batches are {equal}."]
    if args.quick:
        lines += ["", "--quick: tiny sizes, so these figures say nothing about speed."]
    return lines


# ---------------------------------------------------------------- the command line

def build_parser():
    parser = Parser(description="Time the template's way of training and predicting against ours.")
    add = parser.add_argument
    add("--DR", metavar="DIR", help="data folder (None: demo data in a temporary folder)")
    add("--device", type=device_name, metavar="DEVICE",
        help="cuda, cuda:N or cpu (None: cuda where there is one, else cpu)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="ours; the template's way is always fp32")
    add("--compile", action="store_true", help="also time ours with torch.compile")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help="parts to run: " + ", ".join(PARTS))
    add("--runs", type=number(int, 1, 1000), default=5, metavar="N",
        help="timed runs of each, alternating")
    add("--batch_size", type=number(int, 1, 4096), default=2, metavar="N", help="windows a step")
    add("--train_vi_len", type=number(int, 4, 1024), default=16, metavar="N",
        help="frames of a window")
    add("--rollout_frames", type=number(int, 1, 10_000), metavar="N",
        help="frames to predict of each test sequence (None: 32, on CUDA all 629)")
    add("--frame_H", type=number(int, 8, 4096), default=32, metavar="N", help="height of a frame")
    add("--frame_W", type=number(int, 8, 4096), default=64, metavar="N", help="width of a frame")
    add("--json", metavar="FILE", help="also write every single time into this file")
    add("--quick", action="store_true",
        help="tiny sizes that take seconds: shows that it works, measures nothing")
    return parser


def sized(args):
    """Give args the sizes of the networks, with --quick tiny ones; return args."""
    for name, value in (TINY_DIMS if args.quick else DIMS).items():
        setattr(args, name, value)
    if args.quick:
        args.train_vi_len, args.rollout_frames, args.frame_H, args.frame_W = 4, 4, 16, 32
    return args


def measure(args, root, folder):
    """Run the parts that were asked for; return the Bench with their figures."""
    bench = Bench(args, root, folder)
    if bench.count < args.batch_size * args.train_vi_len:
        raise UserError(f"--batch_size {args.batch_size}: {root} holds {bench.count} training "
                        f"frames; expected {args.batch_size} windows of {args.train_vi_len}")
    ways, rounds, sizes = 2 + args.compile, args.runs + 1, len({size for *_, size in bench.sizes()})
    pool = (ways + args.device.startswith("cuda")) * (4 * args.runs + 1)
    calls = {"data": 2 * rounds, "training": 2 * ways * rounds, "pool": pool,
             "rollout": ways * rounds, "memory": len(bench.memory_cases()),
             "growth": 2 * (max(1, args.runs // 2) + 1) * sizes, "equality": 0}
    chosen = [part for part in PARTS if part in args.only]
    total = sum(calls[part] for part in chosen)
    with progress(total=total, unit="run", desc="benchmark") as bench.bar:
        for part in chosen:
            getattr(bench, part)()
    return bench


def draw_demo_data(args, root):
    """Draw as much demo data as the benchmark needs."""
    train, sequence = DEMO_FRAMES, max(DEMO_SEQUENCE, args.rollout_frames + 1)
    if args.quick:
        train, sequence = 64, 6
    script = str(ROOT / "scripts" / "make_demo_data.py")
    words = [root, "--train_frames", str(train), "--sequence_frames", str(sequence)]
    subprocess.run([sys.executable, script, *words], check=True, stdout=sys.stderr)


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.device = str(pick_device(args.device))
    args.rollout_frames = args.rollout_frames or (629 if args.device.startswith("cuda") else 32)
    args = sized(args)
    path = args.json and Path(args.json)
    if path and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise UserError(f"--json {path}: expected a file, in a folder that is there")
    warnings.filterwarnings("ignore", message=".*DataLoader will create.*")
    # decoded frames go into the folder too: the first epoch is to be a first one
    with tempfile.TemporaryDirectory() as folder:
        root = args.DR
        if root is None:
            root = str(Path(folder) / "demo")
            draw_demo_data(args, root)
        bench = measure(args, root, folder)
        print("\n".join(markdown(bench)))
    if path:
        everything = {"machine": machine(args.device), "settings": vars(args),
                      "precision": bench.precision, "matmul_peak_gflops": bench.peak,
                      "timings": bench.timings, **bench.extra}
        path.write_text(json.dumps(everything, indent=1) + "\n")
        print(f"\nwritten: {path}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
