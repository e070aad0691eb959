"""Train the pose-conditioned VAE of the lab: one photo and 630 poses in, the 629 frames that follow out.

    python Trainer.py --DR data --save_root ckpt --fast_train                 # the recommended command
    python Trainer.py --DR data --save_root ckpt --fast_train --max_minutes 60
    python Trainer.py --DR data --save_root ckpt --fast_train --resume        # go on after a stop, a crash, a kill
    python Trainer.py --DR data --save_root out --ckpt_path ckpt/best.ckpt --test      # validate a checkpoint
    torchrun --nproc_per_node=8 Trainer.py --DR data --save_root ckpt --gpu 8          # eight GPUs

Reads top to bottom as the algorithm: loss and metric, schedules, the pool of running rollouts, then `VAE_Model` with its
training step, its rollout, its training stage and its checkpoints, and the command line at the end.
"""

import argparse
import copy
import math
import os
import re
import shlex
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from utils import cli
from utils import options
from utils.cli import Stopped, UserError, progress, say
from dataloader import Dataset_Dance, Frames, ImageLoader, WindowLoader, find_clips, frame_transform
from utils.frame_cache import decode
from utils.hardware import check_torch, has_bf16, pick_device, pick_precision
from modules import Decoder_Fusion, Gaussian_Predictor, Generator, Label_Encoder, RGB_Encoder
from utils.muon import Muon, is_matrix
from utils.checkpoint import NETWORKS, file_version, is_latest_in, load_weights, optimizer_fits, read_checkpoint, sizes, write_checkpoint
from utils.files import check_save_root, locked, make_folder, set_aside, sweep_leftovers, write_csv
from utils.logger import HISTORY, log_to_tensorboard, plot_psnr, tensorboard_writer, write_gif

CLIP_NORM = 1.0           # gradient norm, the template's
FAST_LR = 1.5             # how much larger --fast_train's learning rate is, unless --lr is given
WARM_UP = 0.02            # share of the run in which the cosine schedule climbs; at most a tenth of the first epoch
ROLLOUT_BLOCK = 32        # frames between two looks at the rollout: progress bar, signals, non-finite values
MAX_SKIPPED = 20          # non-finite steps in a row that end training
POSE_SAMPLE = 4096        # training poses that BatchNorm's statistics are recomputed over
NOISE_MSE = 1e-5          # 50 dB: errors below it hardly count
GIF_TICK = 40             # milliseconds a frame, the template's
# not the label encoder: it is small, and would be compiled once more for the last, shorter block of a rollout
COMPILED = [name for name in NETWORKS if name != "label_transformation"]
# PyTorch's own error is torch.OutOfMemoryError; others are found by the words of a CPU, cuDNN or cuBLAS, and the driver
OUT_OF_MEMORY = "can't allocate memory|ALLOC(ATION)?_FAILED|CUDA error: out of memory"
CPU_PIXELS = 8 * 32 * 64  # what a CPU computes at a time: more gains little and adds up less exactly (docs/PERFORMANCE.md)

# PyTorch takes a first step that is skipped for a wrong order; with fp16, whose scale has to be found, it often is
warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")


# ---------------------------------------------------------------- loss and metric

def Generate_PSNR(imgs1, imgs2, data_range=1.):
    """Peak signal-to-noise ratio in dB, one number over the whole tensor (inf where the two are equal)."""
    return 20 * math.log10(data_range) - 10 * torch.log10(F.mse_loss(imgs1, imgs2))


def kl_criterion(mu, logvar, batch_size):
    """KL(q || N(0, I)) summed over latent elements, averaged over the batch, in nats.

    mu, logvar: (B, N_dim, H, W). Kingma & Welling 2014, appendix B.
    """
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / batch_size


def log_mse(frames, truth):
    """The logarithm of each picture's MSE, so that a decibel counts the same at every PSNR (Rybkin et al. 2021, calibrated decoders).

    frames, truth: (B, 3, H, W) in [0, 1]. 0 where they are equal; the gradient is that of the MSE at 30 dB, more below that error, less above.
    """
    return 1e-3 * torch.log1p((frames - truth).square().mean((1, 2, 3)) / NOISE_MSE).mean()


# ---------------------------------------------------------------- schedules (epochs count from 0)

class kl_annealing:
    """The weight beta in [0, 1] of the KL term, one value an epoch (Fu et al. 2019, Cyclical Annealing Schedule).

    args: kl_anneal_type (Cyclical, Monotonic or None, in any case), kl_anneal_cycle, kl_anneal_ratio, num_epoch.
    UserError for cycles below 1 and a ratio outside (0, 1].
    """

    def __init__(self, args, current_epoch=0):
        args = build_parser().fill(copy.copy(args))
        try:
            kind = options.kl_anneal_type(args.kl_anneal_type)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--kl_anneal_type: {error}") from None
        if args.kl_anneal_cycle < 1:
            raise UserError(f"--kl_anneal_cycle {args.kl_anneal_cycle}: expected at least 1")
        if not 0 < args.kl_anneal_ratio <= 1:
            raise UserError(f"--kl_anneal_ratio {args.kl_anneal_ratio}: expected above 0 and at most 1")
        cycles = args.kl_anneal_cycle if kind == "Cyclical" else 1
        most = max(1, args.num_epoch // 2)
        if cycles > most:
            say(f"--kl_anneal_cycle {cycles} is more than {args.num_epoch} epochs hold: {most} used")
            cycles = most
        self.current_epoch = current_epoch
        self.betas = [1.0] * args.num_epoch
        if kind != "None":
            self.betas = self.frange_cycle_linear(args.num_epoch, 0.0, 1.0, cycles, args.kl_anneal_ratio)

    def update(self):
        """Go on to the next epoch."""
        self.current_epoch += 1

    def get_beta(self):
        """The current epoch's beta; after the last epoch, the last one."""
        return self.betas[min(self.current_epoch, len(self.betas) - 1)]

    @staticmethod
    def frange_cycle_linear(n_iter, start=0.0, stop=1.0, n_cycle=1, ratio=1):
        """n_iter values: in each of n_cycle cycles the first `ratio` climbs from start to stop, the rest is stop."""
        period = n_iter / n_cycle
        starts = [int(c * period) for c in range(math.ceil(n_cycle))] + [n_iter]
        return [start + (stop - start) * min(1.0, i / (period * ratio)) for first, end in zip(starts, starts[1:]) for i in range(end - first)]


def teacher_forcing_ratio(args, epoch):
    """The chance of ground truth as the history in an epoch: constant, from epoch tfr_sde on tfr_d_step less each."""
    return max(0.0, args.tfr - args.tfr_d_step * max(0, epoch - args.tfr_sde + 1))


def learning_rate_factor(args, epoch, done):
    """What the learning rate is multiplied with. done: the share of the run that is over, in [0, 1]."""
    if args.schedule == "step":  # the template's MultiStepLR
        factor = 0.1 ** sum(epoch >= milestone for milestone in (2, 5))
    else:  # cosine with warm-up (Loshchilov & Hutter 2017), from a twentieth: the first step must not be for nothing
        warm_up = min(WARM_UP, 0.1 / args.num_epoch * min(1.0, data_share(args, 0) / data_share(args, args.num_epoch - 1)))
        factor = min(1.0, done / warm_up + 0.05) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if args.fast_train and epoch < args.fast_train_epoch and "lr" not in args.given:
        factor *= FAST_LR
    return factor


def data_share(args, epoch):
    """The share of the training data that an epoch sees."""
    return args.fast_partial if args.fast_train and epoch < args.fast_train_epoch else args.partial


# ---------------------------------------------------------------- the pool of running rollouts

class RolloutPool:
    """Lanes that each hold a frame the network generated, and where in the training data it stands.

    A training step draws a few lanes, predicts from each lane's frame a frame of the same clip, and puts the prediction
    back. So the network trains on histories dozens of its own steps deep at the price of one. A lane chosen for teacher forcing
    restarts from ground truth somewhere in the data. docs/RECIPE.md has the evidence.

    dataset: a Dataset_Dance of the train split. clips: `find_clips` of its frames; no window crosses a cut. device: where the
    network is; the lanes' frames stay there, wherever the data are.
    """

    def __init__(self, dataset, clips, lanes, seed, device="cpu"):
        self.dataset, self.clips, self.device = dataset, torch.tensor(clips), device
        self.generator = torch.Generator().manual_seed(seed)
        self.position = self.random_positions(lanes)
        self.pictures = dataset.take(self.position)[0].to(device)  # float32 (lanes, 3, H, W) in [0, 1]

    def random_positions(self, count):
        return torch.randint(int(self.clips[-1]), (count,), generator=self.generator)

    def draw(self, batch_size, length, next_share, teacher):
        """A batch of windows (B, length, 3, H, W) with their poses, frame 0 being the lane's. Remembers what was drawn.

        teacher: bool (B,), lanes that restart from ground truth.
        """
        lanes = torch.randperm(len(self.position), generator=self.generator)[:batch_size]
        position = torch.where(teacher, self.random_positions(batch_size), self.position[lanes])

        # the frames to predict: those that follow in the clip, or any others of it
        clip = torch.searchsorted(self.clips, position, right=True)
        first, last = self.clips[clip - 1], (self.clips[clip] - length + 1).clamp(min=self.clips[clip - 1])
        anywhere = first + (torch.rand(batch_size, generator=self.generator) * (last - first + 1)).long()
        goes_on = (torch.rand(batch_size, generator=self.generator) < next_share) & (position + 1 <= last)
        start = torch.where(goes_on, position + 1, anywhere)
        # a clip shorter than a window repeats its last frame
        index = torch.minimum(start[:, None] + torch.arange(length - 1), self.clips[clip][:, None] - 1)

        # the past frame: ground truth where a lane restarts, else what was generated there
        self.lanes, self.arrived = lanes, index[:, -1]
        self.rows, restarts, truth, img, label = (x.to(self.device, non_blocking=True) for x in (
            lanes, teacher.view(-1, 1, 1, 1), self.dataset.take(position)[0], *self.dataset.take(index)))
        self.history = torch.where(restarts, truth, self.pictures.index_select(0, self.rows))
        # the step never looks at the pose of the past frame: any picture will do in its place
        return torch.cat([self.history[:, None], img], 1), torch.cat([label[:, :1], label], 1)

    def put(self, generated):
        """The last frames (B, 3, H, W) generated from the drawn windows become their lanes' frames, clamped to [0, 1]."""
        finite = generated.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        self.pictures.index_copy_(0, self.rows, torch.where(finite, generated.float().clamp(0, 1), self.history))
        self.position[self.lanes] = self.arrived

    def state_dict(self):
        return {"generator": self.generator.get_state(), "position": self.position, "pictures": self.pictures.cpu()}

    def load_state_dict(self, state):
        if state["pictures"].shape != self.pictures.shape:
            return  # --pool or the frame's size is another one now: the lanes start anew
        self.generator.set_state(state["generator"])
        self.position = state["position"].clamp(max=int(self.clips[-1]) - 1)
        self.pictures = state["pictures"].to(self.device)


# ---------------------------------------------------------------- the model

def channels_last(x):
    """(B, C, H, W) laid out as the convolutions like it."""
    return x.contiguous(memory_format=torch.channels_last)


def in_pieces(function, *inputs, size=None):
    """Apply a function that treats every picture alone to (N, ...) tensors, `size` pictures at a time (None: what suits the device)."""
    count, _, height, width = inputs[0].shape
    if size is None:
        size = max(1, CPU_PIXELS // (height * width)) if inputs[0].device.type == "cpu" else count
    pieces = [function(*at) for at in zip(*(x.split(size) for x in inputs))]
    return join(pieces) if torch.is_tensor(pieces[0]) else tuple(map(join, zip(*pieces)))


def join(parts):
    """torch.cat, without a copy of what is whole already."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def evaluating(model):
    """Inside, BatchNorm uses its running statistics; afterwards the model is in the mode it was in."""
    was = model.training
    nn.Module.train(model, False)
    try:
        yield
    finally:
        nn.Module.train(model, was)


@contextmanager
def enough_memory(flag, instead):
    """Inside, a device without room is a UserError that names the flag, with its value, and what was expected instead."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        raise UserError(f"{flag}: needs more memory than the device has free; expected {instead}") from None


def compiled_call(network, dynamic):
    """torch.compile of a network's call, whole: nn.Module.compile() takes a Sequential block by block before PyTorch 2.14.

    dynamic: as in torch.compile.
    """
    def call(*inputs):
        return network._call_impl(*inputs)

    return torch.compile(call, dynamic=dynamic)


class Float32Conv2d(nn.Conv2d):
    """A convolution that stays in float32 under autocast (on CUDA in TF32, as all of float32 there).

    The first of the pose encoder and the last of the generator are small, and in bf16 a rollout loses up to 0.6 dB by them: BatchNorm's
    recomputed statistics are those of float32, and rounded frames are fed back (docs/PERFORMANCE.md).
    """

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class VAE_Model(nn.Module):
    """The conditional VAE, its training stage, its validation rollout and its checkpoints.

    args: a Namespace of `build_parser()`, or any other: a flag it lacks has the default, and without `recipe` it trains
    the template's way. UserError for a device that is not there and for values that can't be.
    """

    # here, not in __init__: subclasses may never run it but build the five networks themselves, as the template's Tester does
    current_epoch = 0
    step = steps_done = 0           # in this epoch, and in the whole run
    best_psnr = -math.inf
    ema = None                      # averaged weights by name
    pool = None                     # the RolloutPool
    poses = None                    # the training poses that BatchNorm's statistics are recomputed over
    train_frames = None             # how many the data hold
    restored = None                 # a checkpoint's training state, until training goes on from it
    read_version = None             # and the file's version when it was read
    began = clock = None            # when the command began, and the Clock of --max_minutes
    fitted_epochs = None            # num_epoch of the stopped run that goes on
    asked_epochs = None             # num_epoch before --max_minutes fitted it
    bar = board = None              # tqdm's bar, TensorBoard's writer
    rank, world, parallel = 0, 1, None  # torchrun's, and DistributedDataParallel around the model
    stop_signal, agreed = None, 0   # the signal that came here, and the one that all ranks know of

    def __init__(self, args):
        super().__init__()
        self.args = args
        args.device = str(pick_device(args.device))
        torch.manual_seed(args.seed)
        with enough_memory(f"--F_dim {args.F_dim}, --L_dim {args.L_dim}, --N_dim {args.N_dim}, --D_out_dim {args.D_out_dim}", "smaller ones"):
            self.frame_transformation = RGB_Encoder(3, args.F_dim)
            self.label_transformation = Label_Encoder(3, args.L_dim)
            self.Gaussian_Predictor = Gaussian_Predictor(args.F_dim + args.L_dim, args.N_dim)
            self.Decoder_Fusion = Decoder_Fusion(args.F_dim + args.L_dim + args.N_dim, args.D_out_dim)
            self.Generator = Generator(args.D_out_dim, 3)
            for layer in (self.label_transformation[1], self.Generator[-1]):
                layer.__class__ = Float32Conv2d  # the same weights, by the same names
            self.to(args.device, memory_format=torch.channels_last)
        self.mse_criterion = nn.MSELoss()
        self.current_epoch = 0
        self.train_vi_len, self.val_vi_len, self.batch_size = args.train_vi_len, args.val_vi_len, args.batch_size
        self.set_up_training()

    def set_up_training(self):
        """What training needs beside the networks; a subclass that never ran __init__ gets it when it is first needed."""
        if "coins" in self.__dict__:
            return
        args = self.args
        self.tfr_d_step, self.tfr_sde = args.tfr_d_step, args.tfr_sde
        self.teacher_forcing_ratio_update()
        self.kl_annealing = kl_annealing(args, self.current_epoch)
        self.coins = torch.Generator().manual_seed(args.seed)
        self.history = []
        self.skipped_in_a_row = torch.zeros((), dtype=torch.long, device=self.device)
        self.new_optimizer()
        self.reset_totals()

    @property
    def args(self):
        return self.__dict__["_args"]

    @args.setter
    def args(self, args):
        self.__dict__["_args"] = self.flags().fill(args)

    @staticmethod
    def flags():
        return build_parser()

    @property
    def device(self):
        return next(self.frame_transformation.parameters()).device

    def new_optimizer(self):
        """The optimizer as a fresh start, with the learning rate that the schedule has now."""
        kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "Muon": Muon}[self.args.optim]
        self.optim = kind(self.parameters(), lr=self.args.lr, fused=self.device.type in ("cuda", "cpu"))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optim, lambda _: learning_rate_factor(self.args, self.current_epoch, self.share_done()))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    # ------------------------------------------------------------ one training step: the assignment's figure 2 (a)

    def forward(self, img, label, adapt_TeacherForcing=False):
        """Loss of a batch of windows, and the last frame generated there.

        img, label: (B, T, 3, H, W), float32 in [0, 1]; frame 0 is the past frame. adapt_TeacherForcing: True or False
        for the whole window, or bool (T,): whether frame t is predicted from ground truth t - 1 (t = 1 always is).
        Returns (loss, mse, kl, generated (B, 3, H, W)): means over the T - 1 predicted frames, kl in nats.
        """
        batch, length = img.shape[:2]
        taught = torch.as_tensor(adapt_TeacherForcing).expand(length).tolist()
        # time steps lie one after the other in one batch: (B, T, 3, H, W) -> (T * B, 3, H, W). Joined and split along
        # it, tensors stay channels-last, their gradients too; with a dimension of time PyTorch would rearrange them
        img, label = (channels_last(x.transpose(0, 1).flatten(0, 1)) for x in (img, label))

        # what does not depend on a prediction, for all time steps at once
        pose = self.label_transformation(label[batch:])                               # ((T-1) * B, L_dim, H, W)
        feature = self.saving_memory(self.frame_transformation, batch, img).split(batch)   # T of (B, F_dim, H, W)
        z, mu, logvar = self.saving_memory(self.Gaussian_Predictor, batch, join(feature[1:]), pose)  # N_dim channels
        pose, z = pose.split(batch), z.split(batch)

        # step s predicts frame s + 1: from ground truth all at once, else from the frame just generated
        forced = [s for s in range(length - 1) if s == 0 or taught[s + 1]]
        inputs = [join([x[s] for s in forced]) for x in (feature, pose, z)]
        generated = dict(zip(forced, self.saving_memory(self.decode, batch, *inputs).split(batch)))
        for s in range(length - 1):
            if s not in generated:
                generated[s] = self.saving_memory(self.next_frame, batch, generated[s - 1], pose[s], z[s])

        frames = join([generated[s] for s in range(length - 1)])                      # ((T-1) * B, 3, H, W)
        frames, truth = frames.float(), img[batch:]
        mse = getattr(self, "mse_criterion", F.mse_loss)(frames, truth)
        kl = kl_criterion(mu.float(), logvar.float(), len(mu))
        reconstruction = log_mse(frames, truth) if self.args.objective == "log_mse" else mse
        loss = reconstruction + self.kl_annealing.get_beta() * self.args.kl_weight * kl
        return loss, mse, kl, generated[length - 2]

    def decode(self, history, pose, z):
        """Features of the past frame and the pose, and z, each (B, ..., H, W), to frames (B, 3, H, W)."""
        frame = self.Generator(self.Decoder_Fusion(history, pose, z.to(history.dtype)))  # one float32 would make all of them that
        return {"none": lambda x: x, "clamp": lambda x: x.clamp(0, 1), "sigmoid": torch.sigmoid}[self.args.output](frame)

    def next_frame(self, previous, pose, z):
        """The frame that follows `previous` (B, 3, H, W): one step of a rollout."""
        return self.decode(self.frame_transformation(previous), pose, z)

    def saving_memory(self, function, batch, *inputs):
        """in_pieces(function, ...); with --checkpoint_steps a time step at a time, its activations computed again backward."""
        if self.args.checkpoint_steps and torch.is_grad_enabled():
            return in_pieces(partial(checkpoint, function, use_reentrant=False), *inputs, size=batch)
        return in_pieces(function, *inputs)

    def set_learning_rate(self):
        """Give the optimizer the rate that the schedule has now."""
        for group, rate in zip(self.optim.param_groups, self.scheduler.base_lrs):
            group["lr"] = rate * learning_rate_factor(self.args, self.current_epoch, self.share_done())

    def training_one_step(self, img, label, adapt_TeacherForcing):
        """Forward, backward and one step of the optimizer on a batch of windows; returns the loss (see `forward`)."""
        self.set_up_training()
        self.optim.zero_grad(set_to_none=True)
        img, label = img.to(self.device, non_blocking=True), label.to(self.device, non_blocking=True)
        statistics = [buffer.clone() for buffer in self.buffers()]  # BatchNorm's: the forward pass moves them
        with self.autocast():
            # not self(...): a subclass in the template's way overrides forward
            loss, mse, kl, self.generated = (self.parallel or partial(VAE_Model.forward, self))(img, label, adapt_TeacherForcing)
        # a loss may overflow where its gradient does not; a NaN factor tells every rank, without a synchronisation
        self.scaler.scale(loss).backward(torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss))
        finite = self.optimizer_step()
        self.add_up(finite, torch.stack([loss, mse, kl]), statistics)
        return loss.detach()

    def optimizer_step(self):
        """Clip the gradient's norm, step, and move the averaged weights; a non-finite gradient skips the step. Returns whether it was finite, a tensor."""
        self.scaler.unscale_(self.optim)
        finite = nn.utils.clip_grad_norm_(self.parameters(), CLIP_NORM).isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optim)
            self.scaler.update()
        elif self.device.type == "cuda":  # the fused kernel itself looks at the flag, so the host need not wait for it
            self.optim.grad_scale, self.optim.found_inf = None, (~finite).float()
            self.optim.step()
        elif finite:
            self.optim.step()
        if self.ema is not None:
            decay = min(self.args.ema, (1 + self.steps_done) / (10 + self.steps_done))  # short runs forget their start (TensorFlow's num_updates)
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters()], 1 - decay)
        return finite

    @torch.no_grad()
    def add_up(self, finite, figures, statistics):
        """Count a step for the history, on the device without a synchronisation; a skipped one leaves BatchNorm as it was."""
        for buffer, before in zip(self.buffers(), statistics):
            buffer.copy_(torch.where(finite, buffer, before))
        self.generated = self.generated.detach()
        self.totals[:3] += torch.where(finite, figures.detach().to(self.totals), 0.0)
        self.totals[3] += finite
        self.totals[4] += ~finite
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * ~finite

    # ------------------------------------------------------------ the rollout: figure 2 (b)

    def rollout(self, first, label, on_block=None):
        """Generate a sequence from its first frame and its poses; validation and testing share it.

        first: (S, 3, H, W), label: (S, T, 3, H, W), float32 in [0, 1]. Returns (S, T - 1, 3, H, W) in [0, 1], on the CPU.
        z is drawn at every step from N(0, I), for each sequence from a generator of its own seeded with --seed, so a
        sequence comes out the same alone and among others, but for rounding. The frame fed back is the one returned, clamped;
        with --rollouts N each of the N feeds back its own, and their mean is returned.
        on_block(t, frames) is called every few frames with those made since, t of them so far.
        UserError names sequence and frame of a non-finite prediction.
        """
        args, device = self.args, self.device
        count, length = label.shape[:2]
        shape = (args.N_dim, *label.shape[-2:])
        noise = [torch.Generator(device).manual_seed(args.seed + i) for _ in range(count) for i in range(args.rollouts)]
        previous = first.to(device).repeat_interleave(args.rollouts, 0)
        blocks = []
        room = enough_memory(f"--rollouts {args.rollouts}, {count} sequence(s) of {label.shape[-1]}x{label.shape[-2]}", "fewer, or --device cpu")
        # inference mode costs least, but there autocast would cast every weight again for every frame
        without_gradient = torch.inference_mode() if self.precision == "fp32" else torch.no_grad()
        with room, evaluating(self), self.autocast(), without_gradient:
            for start in range(1, length, ROLLOUT_BLOCK):
                # (S, t, 3, H, W) -> (t, S, L_dim, H, W); every sequence as often as it is rolled out
                poses = label[:, start:start + ROLLOUT_BLOCK].transpose(0, 1).to(device)
                pose = self.label_transformation(channels_last(poses.flatten(0, 1))).unflatten(0, poses.shape[:2])
                pose = pose.repeat_interleave(args.rollouts, 1)
                steps = len(pose)
                if args.z == "prior":
                    z = torch.stack([torch.randn(steps, *shape, generator=g, device=device) for g in noise], 1)
                else:
                    z = torch.zeros(steps, len(noise), *shape, device=device)
                frames, finite = [], []
                for s in range(steps):
                    previous = self.next_frame(channels_last(previous), channels_last(pose[s]), channels_last(z[s])).float()
                    finite.append(previous.isfinite().flatten(1).all(1))
                    previous = previous.clamp(0, 1)
                    frames.append(previous)
                bad = ~torch.stack(finite).cpu()
                if bad.any():
                    step, lane = bad.nonzero()[0].tolist()
                    raise UserError(f"rollout of sequence {lane // args.rollouts}: frame {start + step} is not finite; expected "
                                    f"weights that give finite frames (train longer, or with a smaller --lr)")
                blocks.append(torch.stack(frames, 1).unflatten(0, (count, args.rollouts)).mean(1).cpu())
                if on_block:
                    on_block(start + steps - 1, blocks[-1])
        return torch.cat(blocks, 1)

    def val_one_step(self, img, label):
        """Roll out a batch of sequences, img and label (B, T, 3, H, W). Returns (loss, T - 1 PSNRs in dB, means over B)."""
        squared = []

        def look(done, frames):
            squared.append((frames - img[:, 1 + done - frames.shape[1]:1 + done].cpu()).square().mean((2, 3, 4)))
            so_far = -10 * torch.log10(torch.cat(squared, 1)).mean()
            self.tqdm_bar("val", self.bar, so_far, self.optim.param_groups[0]["lr"] if hasattr(self, "optim") else 0.0, frames.shape[1])
            self.stop_if_asked(alone=True)

        self.predicted = self.rollout(img[:, 0], label, look)  # (B, T - 1, 3, H, W), kept for pictures
        squared = torch.cat(squared, 1)
        return squared.mean(), (-10 * torch.log10(squared)).mean(0).tolist()

    def eval(self):
        """One validation rollout of the whole validation sequence. Returns the mean PSNR in dB; makes save_root.

        This is the template's name for its validation loop. It hides nn.Module.eval(), so modes are switched with
        nn.Module.train(model, flag) alone.
        """
        losses, psnrs = [], []
        loader = self.val_dataloader()
        if self.args.save_root is not None:
            make_folder(self.args.save_root)
        with self.validated_weights(), progress(total=len(loader) * (self.args.val_vi_len - 1), unit="frame",
                                                desc=f"val   {self.current_epoch}", leave=False) as self.bar:
            for img, label in loader:
                loss, psnr = self.val_one_step(img, label)
                losses.append(loss)
                psnrs.append(psnr)
        self.bar = None
        self.val_loss = float(torch.stack(losses).mean())
        self.psnr_per_frame = np.mean(psnrs, axis=0).tolist()
        self.val_sequence = (label[0, 1:].cpu(), self.predicted[0], img[0, 1:].cpu())
        return float(np.mean(self.psnr_per_frame))

    # ------------------------------------------------------------ averaged weights

    @contextmanager
    def validated_weights(self):
        """Inside, the model holds the weights that are validated and kept, where they are not the raw ones.

        Parameters averaged over training (EMA), and BatchNorm's statistics recomputed for them: running averages lag
        behind moving weights, and averaged weights need statistics of their own.
        """
        if self.ema is None and self.poses is None:
            yield
            return
        raw = self.network_state()
        with torch.no_grad():
            for name, average in (self.ema or {}).items():
                self.get_parameter(name).copy_(average)
        if self.poses is not None:
            self.refresh_norm()
        try:
            yield
        finally:
            self.load_network_state(raw)

    @torch.no_grad()
    def refresh_norm(self):
        """BatchNorm's statistics over the sample of training poses, in one pass through the first convolution."""
        blocks = max(1, len(self.poses) // 128)
        stem = nn.Sequential(*list(self.label_transformation)[:3])
        # each block is every blocks-th pose, so that all have nearly the same mean and their variances may be averaged
        update_bn((channels_last(self.poses[i::blocks].float().div(255).to(self.device)) for i in range(blocks)), stem)

    def network_state(self):
        """A copy of the five networks' weights, by the keys that a checkpoint has."""
        return {name: value.detach().clone() for name, value in self.state_dict().items() if name.split(".")[0] in NETWORKS}

    @torch.no_grad()
    def load_network_state(self, weights):
        """Take back what `network_state` gave."""
        own = self.state_dict()
        for name, value in weights.items():
            own[name].copy_(value)

    def autocast(self):
        """The context in which the network runs: mixed precision where `precision` says so."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    @property
    def precision(self):
        """fp32, bf16 or fp16: --precision, or what is fastest here; found out once."""
        if "_precision" not in self.__dict__:
            picked = [pick_precision(self.args.precision, self.device)]
            if dist.is_available() and dist.is_initialized():  # ranks may time their GPUs differently
                dist.broadcast_object_list(picked, 0)
            self.__dict__["_precision"], self.precision_reason = picked[0]
        return self.__dict__["_precision"]

    # ------------------------------------------------------------ data

    def frames(self, mode):
        """The decoded frames of a split, or None with --no_cache. Decoded once, kept beside the data."""
        if self.args.no_cache:
            return None
        cache = self.__dict__.setdefault("_frames", {})
        if mode not in cache:
            args = self.args
            cache[mode] = Frames(args.DR, mode, args.frame_H, args.frame_W, args.cache_dir, args.num_workers).to(self.device)
        return cache[mode]

    def dataset(self, mode, video_len, partial=1.0):
        require(self.args, "DR")
        transform = frame_transform(self.args.frame_H, self.args.frame_W)
        return Dataset_Dance(self.args.DR, transform, mode, video_len, partial, self.frames(mode))

    def train_dataloader(self, skip=0):
        """Batches of this epoch's training windows in order, this rank's share of them, from batch `skip` on."""
        args = self.args
        dataset = self.dataset("train", args.train_vi_len, data_share(args, self.current_epoch))
        order = range(self.rank, len(dataset) - len(dataset) % self.world, self.world)[skip * args.batch_size:]
        if dataset.frames is not None:
            return WindowLoader(dataset, args.batch_size, order)
        return ImageLoader(dataset, args.batch_size, args.num_workers, sampler=order,
                           drop_last=True)

    def check_batch_size(self, windows):
        """UserError where a batch holds more than there is to draw from: the pool's lanes, or this many windows."""
        args = self.args
        if args.pool and args.batch_size > args.pool:
            raise UserError(f"--batch_size {args.batch_size}: expected at most the {args.pool} lanes of --pool")
        if not args.pool and windows // self.world < args.batch_size:
            raise UserError(f"--batch_size {args.batch_size}: the training data hold {windows} windows of {args.train_vi_len} "
                            f"frames for {self.world} process(es); expected at least one batch each")

    def val_dataloader(self):
        """Batches of one validation sequence of val_vi_len frames."""
        dataset = self.dataset("val", self.args.val_vi_len)
        if dataset.frames is not None:
            return WindowLoader(dataset, 1)
        return ImageLoader(dataset, 1, min(1, self.args.num_workers))

    def steps_in(self, epoch):
        """Training steps of an epoch on this rank."""
        args = self.args
        if self.pool is None:
            windows = int(self.train_frames * data_share(args, epoch)) // args.train_vi_len
            return windows // self.world // args.batch_size
        predicted = args.batch_size * (args.train_vi_len - 1) * self.world
        return max(1, int(self.train_frames * data_share(args, epoch)) // predicted)

    def batches(self, skip):
        """This epoch's windows and teacher flags: (img, label, flags (T,)), from batch `skip` on."""
        args = self.args
        if self.pool is None:
            for img, label in self.train_dataloader(skip):
                yield img, label, self.toss(args.train_vi_len)
            return
        for _ in range(skip, self.steps_in(self.current_epoch)):
            flags = self.toss(args.train_vi_len)
            lanes = self.toss(args.batch_size, all_count=True)
            img, label = self.pool.draw(args.batch_size, args.train_vi_len, args.next_share, lanes)
            yield img, label, flags

    def toss(self, count, all_count=False):
        """`count` coins that come up ground truth with chance tfr: bool (count,), one toss an epoch, a batch, or each."""
        if self.args.tf_coin == "frame":
            coins = torch.rand(count, generator=self.coins)
        elif self.args.tf_coin == "batch":
            coins = torch.rand(1, generator=self.coins).expand(count)
        else:
            coins = torch.full((count,), self.epoch_coin)
        taught = coins < self.tfr
        # tf_share: the first frame of a window has no history and the second one's is given, unless a pool gives it
        tossed = taught if all_count else taught[2:]
        self.taught += int(tossed.sum())
        self.tossed += len(tossed)
        return taught

    # ------------------------------------------------------------ the training stage

    def training_stage(self):
        """Train from the current epoch to the last; after each, validate, record and save.

        A signal of cli.INTERRUPTED saves last.ckpt and raises Stopped. UserError for data that can't be used, a
        save_root that another run holds, and losses that stay non-finite.
        """
        self.began = self.began or time.monotonic()
        self.set_up_training()
        with cli.catching_signals(cli.stop):
            self.open_data()
        make_folder(self.args.save_root)
        room = enough_memory(f"--batch_size {self.args.batch_size}", "a smaller one, or --checkpoint_steps for long windows")
        with room, locked(self.args.save_root) if self.rank == 0 else nullcontext(), cli.catching_signals(self.note_signal):
            try:
                self.begin()
                while self.current_epoch < self.args.num_epoch:
                    self.train_epoch()
                    began = time.monotonic()
                    psnr = self.validate()
                    if self.clock:
                        self.clock.reserve(self.from_rank_0(time.monotonic() - began))
                    self.end_epoch(psnr)
            except Stopped:
                self.write(["last.ckpt"])
                say(f"stopped in epoch {self.current_epoch}, saved; go on with: {resume_command()}")
                raise
            finally:
                self.__dict__["parallel"] = None  # it holds on to the process group, which would end after its threads
                self.began = None  # a stage that follows in this process has minutes of its own
        say(f"done: {self.current_epoch} epochs, best validation PSNR {self.best_psnr:.2f} dB, in {self.args.save_root}")

    def validate(self):
        """`eval` on rank 0, and its PSNR on every rank; a signal or an error there ends it on all of them."""
        if self.world == 1:
            return self.eval()
        for buffer in self.buffers():  # each rank's BatchNorm saw other windows: rank 0's statistics hold
            dist.broadcast(buffer, 0)
        psnr, problem = 0.0, None
        if self.rank == 0:
            try:
                psnr = self.eval()
            except (Stopped, UserError) as error:
                problem = error
        if self.from_rank_0(isinstance(problem, UserError)):
            raise problem or SystemExit(2)  # rank 0 says what it was
        self.agree()
        self.stop_if_asked()
        return self.from_rank_0(psnr)

    def train_epoch(self):
        """The rest of the current epoch's training steps."""
        if self.epoch_coin is None:
            self.epoch_coin = float(torch.rand(1, generator=self.coins))
        steps, began = self.steps_in(self.current_epoch), time.monotonic() - self.seconds
        last_fitted = self.clock and self.clock.fitted and self.current_epoch == self.args.num_epoch - 1
        with progress(total=None if last_fitted else steps, initial=self.step, unit="step", leave=False,
                      disable=self.rank > 0, desc=f"train {self.current_epoch}/{self.args.num_epoch}") as bar:
            while True:
                for img, label, flags in self.batches(self.step % steps if last_fitted else self.step):
                    self.learning_rate_sum += self.optim.param_groups[0]["lr"]
                    loss = self.training_one_step(img, label, flags)
                    if self.pool is not None:
                        self.pool.put(self.generated)
                    self.step += 1
                    self.steps_done += 1
                    self.scheduler.step()
                    # reading a value from a GPU waits for it; at the end of an epoch it must, or its last steps count as validation
                    look = self.device.type == "cpu" or self.steps_done % 20 == 0 or self.step % steps == 0
                    if look:
                        self.tqdm_bar("train", bar, loss, self.optim.param_groups[0]["lr"], self.step - bar.n)
                        self.stop_if_hopeless()
                    self.seconds = time.monotonic() - began
                    if look or self.world == 1:
                        self.agree()
                    if self.args.save_every_steps and self.step % self.args.save_every_steps == 0:
                        self.write(["last.ckpt"])
                    self.stop_if_asked()
                    if self.clock and self.clock.over():
                        return
                if not last_fitted:  # where time is left in a run fitted to it, the last epoch goes round again
                    return

    def end_epoch(self, psnr):
        """Record the epoch that was trained and validated, go on to the next, and write the files."""
        # a run that goes on in another folder has its best there too
        epoch, best = self.current_epoch, psnr > self.best_psnr or not (Path(self.args.save_root) / "best.ckpt").exists()
        if best:
            self.best_psnr = psnr
        if self.rank == 0:
            line = self.record(epoch, psnr, best)
        self.current_epoch, self.step = epoch + 1, 0
        self.kl_annealing.update()
        self.teacher_forcing_ratio_update()
        self.reset_totals()
        self.scheduler.step()
        self.agree()
        if self.clock and self.clock.over():
            self.args.num_epoch = self.current_epoch
        names = ["best.ckpt"] * best + [f"epoch={epoch}.ckpt"] * (epoch % self.args.per_save == 0) + ["last.ckpt"]
        self.write(names)
        if self.rank == 0:
            say(line)

    def record(self, epoch, psnr, best):
        """The epoch's row in history.csv, and the pictures of the best epoch (of every epoch if wanted). Returns a line that says it."""
        loss, mse, kl, taken, skipped = self.totals.tolist()
        taken = max(1, taken)
        frames = self.step * self.args.batch_size * (self.args.train_vi_len - 1) * self.world
        row = dict(zip(HISTORY, (
            epoch, self.learning_rate_sum / max(1, self.step), self.tfr, self.taught / self.tossed if self.tossed else 1.0,
            self.kl_annealing.get_beta(), loss / taken, mse / taken, kl / taken, self.val_loss, psnr,
            min(self.psnr_per_frame), self.psnr_per_frame[-1], int(skipped), self.seconds, frames / max(self.seconds, 1e-9))))
        self.history.append(row)
        root = Path(self.args.save_root)
        write_csv(root / "history.csv", HISTORY, self.history)
        if best:
            self.write_validation(root / "psnr_per_frame.png", root / "val_pred.gif", root / "psnr_per_frame.csv")
        if getattr(self.args, "store_visualization", False):
            self.write_validation(root / f"epoch={epoch}_psnr.png", root / f"epoch={epoch}_pred.gif")
        if self.board:
            log_to_tensorboard(self.board, row, root / "val_pred.gif" if best else None)
        return (f"epoch {epoch}: lr {row['lr']:.2e}, tfr {self.tfr:.3f}, beta {row['beta']:.2f}, loss {row['train_loss']:.5f} "
                f"(mse {row['train_mse']:.5f}, kl {row['train_kl']:.1f}), validation PSNR mean {psnr:.2f} min {row['val_psnr_min']:.2f} "
                f"last {row['val_psnr_last']:.2f} dB, {row['frames_per_second']:.1f} frames/s" + (", best" if best else ""))

    def begin(self):
        """Ready the first step: state of a checkpoint or a fresh start, averages, the other ranks, the clock."""
        args = self.args
        # the folder's lock is held only now, and decoding may have taken minutes
        own = self.restored and Path(args.ckpt_path).resolve().parent == Path(args.save_root).resolve()
        if own and file_version(args.ckpt_path) != self.read_version:
            raise UserError(f"{args.ckpt_path}: another run has written it since it was read here; expected the same command once more")
        # from an earlier checkpoint another line of epochs begins, and the best one of this line must not be lost to it
        goes_on_here = self.steps_done or self.restored and is_latest_in(args.save_root, args.ckpt_path)
        self.set_learning_rate()
        if args.ema and self.ema is None:
            self.ema = {name: p.detach().clone() for name, p in self.named_parameters()}
        if args.pool:
            clips = find_clips(self.train_pictures)
            self.pool = RolloutPool(self.dataset("train", args.train_vi_len), clips, args.pool, args.seed + self.rank, self.device)
        if self.world > 1:
            # weights come from rank 0; what each rank draws from here on is its own
            self.__dict__["parallel"] = DistributedDataParallel(self)
            # after its first step DistributedDataParallel sums gradients in another order: a step for nothing gets that over
            # with, so that a run that starts and one that goes on have the same bits
            state = copy.deepcopy(self.training_state())
            window = torch.zeros(args.batch_size, 2, 3, args.frame_H, args.frame_W, device=self.device)
            self.parallel(window, window, True)[0].backward()
            self.optim.zero_grad(set_to_none=True)
            self.load_training_state(state)
            torch.manual_seed(args.seed + self.rank)
        if self.restored:
            if len(self.restored["ranks"]) != self.world:
                say(f"{self.world} process(es), the checkpoint's run had {len(self.restored['ranks'])}: not the same run to the bit")
            if self.restored["train_frames"] != self.train_frames:
                say(f"--DR {args.DR}: {self.train_frames} training frames, the checkpoint's run had {self.restored['train_frames']}")
            try:
                self.load_training_state(self.restored)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"--ckpt_path {args.ckpt_path}: its state of training is not one of this version ({type(error).__name__}: "
                                f"{error}); expected a run of this version") from None
            self.fitted_epochs = self.restored["num_epoch"]
            self.scheduler.base_lrs, args.lr, self.restored = [self.base_lr], self.base_lr, None
        self.teacher_forcing_ratio_update()  # from the flags as they are now, whatever the checkpoint had
        if self.rank == 0:
            sweep_leftovers(args.save_root)
            aside = None if goes_on_here else set_aside(args.save_root)
            if aside:
                say(f"--save_root {args.save_root}: the run that was here is in {aside} now; --save_root {aside} --resume goes on with it")
            if args.tensorboard:
                self.board = tensorboard_writer()(str(Path(args.save_root) / "tensorboard"))
        say(f"{args.device}, {self.precision_reason}; {self.train_frames} training frames"
            + (f" in {len(self.pool.clips) - 1} clips" if self.pool else "") + f", {self.steps_in(self.current_epoch)} steps an epoch")
        if self.compiles:
            self.compile_networks()
        if args.max_minutes and self.current_epoch < args.num_epoch:
            self.fit_to_time()

    def open_data(self):
        """Check what training needs and decode its data, before anything is written."""
        args = self.args
        require(args, "DR", "save_root")
        if args.tensorboard:
            tensorboard_writer()
        Dataset_Dance(args.DR, None, "val", args.val_vi_len)  # what needs no decoding first
        # the epochs that see least data need a batch, too
        share = 1.0 if args.pool else min(data_share(args, epoch) for epoch in (self.current_epoch, args.num_epoch - 1))
        self.check_batch_size(len(Dataset_Dance(args.DR, None, "train", args.train_vi_len, share)))

        self.dataset("val", args.val_vi_len)
        dataset = self.dataset("train", args.train_vi_len)
        self.train_frames = dataset.n_frames
        if dataset.frames is not None:
            self.train_pictures, poses = dataset.frames.imgs, dataset.frames.labels
        elif args.pool:  # cuts are found in decoded frames
            self.train_pictures = decode(dataset.img_paths, args.frame_H, args.frame_W, args.num_workers, desc="finding cuts")
        if args.refresh_norm:
            chosen = torch.linspace(0, self.train_frames - 1, min(self.train_frames, POSE_SAMPLE)).round().long()
            if dataset.frames is None:
                poses = torch.from_numpy(decode([dataset.label_paths[i] for i in chosen], args.frame_H, args.frame_W, args.num_workers))
                chosen = slice(None)
            self.poses = poses[chosen.to(poses.device) if torch.is_tensor(chosen) else chosen]

    def mark_for_compiling(self):
        """Have torch.compile take the networks of COMPILED when they are next called."""
        torch._dynamo.config.cache_size_limit = 64  # the networks share one limit, training and rollout too
        for name in COMPILED:  # few sizes come up with windows of 2; kernels that are for any size are slower
            network = getattr(self, name)
            network._compiled_call_impl = compiled_call(network, dynamic=False if self.args.train_vi_len == 2 else None)

    @property
    def compiles(self):
        """Whether training has its networks compiled: on CUDA. On a CPU it does not pay (docs/PERFORMANCE.md)."""
        return self.device.type == "cuda" and not self.args.no_compile

    def compile_networks(self):
        """torch.compile the networks of COMPILED, by a step and a short rollout that leave no trace; where that fails, go on without."""
        args = self.args
        say("compiling the networks (off with --no_compile)")
        state = copy.deepcopy(self.training_state())
        settings = torch._dynamo.config
        settings.optimize_ddp = False  # gradients of 6 MB need no graph split for their sake
        # no gradients are exchanged meanwhile: compiling may fail on one rank alone
        parallel, self.__dict__["parallel"], problem = self.parallel, None, None
        try:
            self.mark_for_compiling()
            shape = (args.batch_size, args.train_vi_len, 3, args.frame_H, args.frame_W)
            for taught in (True, False) if args.train_vi_len > 2 else (True,):
                self.training_one_step(torch.rand(shape), torch.rand(shape), taught)
            with self.validated_weights(), suppress(UserError):  # poses of noise may overflow, and the networks are compiled all the same
                self.rollout(torch.rand(shape)[:1, 0], torch.rand(shape)[:1, :1].expand(1, 3, -1, -1, -1))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no triton, an operator that it can't take: many kinds
            problem = type(error).__name__
        self.__dict__["parallel"] = parallel
        if self.on_any_rank(int(problem is not None)):
            for name in COMPILED:
                getattr(self, name)._compiled_call_impl = None
            say(f"torch.compile does not work here ({problem or 'on another rank'}): going on without it")
        else:
            settings.suppress_errors = True  # what is compiled later falls back by itself
        self.load_training_state(state)

    # ------------------------------------------------------------ a run fitted to --max_minutes

    def fit_to_time(self):
        """Measure a training step and a rollout, and fit epochs and schedules to the minutes that are left."""
        args, before = self.args, self.args.num_epoch
        state = copy.deepcopy(self.training_state())
        self.epoch_coin = 0.0
        seconds, began = [], time.monotonic()
        for (img, label, flags), _ in zip(self.batches(0), range(5)):
            self.training_one_step(img, label, flags)
            if self.pool is not None:
                self.pool.put(self.generated)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.monotonic() - began)
            began = time.monotonic()
        step = sorted(seconds)[len(seconds) // 2]
        loader = self.val_dataloader()
        img, label = next(iter(loader))
        few = min(args.val_vi_len, ROLLOUT_BLOCK + 1)
        for _ in range(2):  # the first one warms up
            began = time.monotonic()
            with self.validated_weights():
                ready = time.monotonic()
                self.rollout(img[:, 0], label[:, :few])
            validation = ready - began + (time.monotonic() - ready) * (args.val_vi_len - 1) / (few - 1) * len(loader)
        self.load_training_state(state)

        step, validation = self.from_rank_0(step), self.from_rank_0(validation)
        now = self.from_rank_0(time.monotonic())  # one clock for all ranks
        self.clock = Clock(self.from_rank_0(self.began + 60 * args.max_minutes), now, validation, self.share_done())
        left, epochs = self.clock.deadline - now, 0
        while self.current_epoch + epochs < before:
            left -= self.steps_in(self.current_epoch + epochs) * step + (validation if epochs else 0)
            if left < 0 and epochs:
                break
            epochs += 1
        args.num_epoch = self.current_epoch + epochs
        self.clock.fitted = args.num_epoch < before or left < 0
        if self.clock.fitted:
            self.asked_epochs = before
            shrink = args.num_epoch / (self.fitted_epochs or before)
            if "tfr_sde" not in args.given:
                # a run that begins on ground truth still does: from its first step on its own frames the loss would explode
                args.tfr_sde = self.tfr_sde = max(min(1, args.tfr_sde), round(args.tfr_sde * shrink))
            if "tfr_d_step" not in args.given:
                args.tfr_d_step = self.tfr_d_step = min(1.0, args.tfr_d_step / shrink)
            self.kl_annealing = kl_annealing(args, self.current_epoch)
            self.teacher_forcing_ratio_update()
        say(f"--max_minutes {args.max_minutes:g}: a step takes {step:.3f} s, a validation about {validation:.0f} s; {args.num_epoch} epochs")

    def ended_by_the_clock(self):
        """Whether the checkpoint is the end of a run that --max_minutes fitted, and the same --num_epoch and a time are asked for again."""
        ended = self.restored and self.restored.get("asked_epochs") == self.args.num_epoch and self.current_epoch >= self.restored["num_epoch"]
        return bool(ended and self.args.max_minutes)

    def share_done(self):
        """The share of the run that is over, in [0, 1]: by its steps, or by the clock where it was fitted to one."""
        if self.clock and self.clock.fitted:
            return self.clock.share()
        if self.train_frames is None:  # a step outside a training stage: at the rate's peak
            return WARM_UP
        return self.steps_done / max(1, self.steps_done - self.step + sum(
            self.steps_in(e) for e in range(self.current_epoch, self.args.num_epoch)))

    # ------------------------------------------------------------ checkpoints

    def checkpoint(self):
        """The whole run as one dict of plain types and tensors. `state_dict`: the weights that are validated."""
        with self.validated_weights():
            weights = self.network_state()
        state = self.training_state()
        raw = {"train_state_dict": state.pop("weights")}
        return {
            "state_dict": weights,
            **(raw if self.ema is not None or self.poses is not None else {}),
            "optimizer": state.pop("optimizer"),
            "lr": self.optim.param_groups[0]["lr"],
            "tfr": self.tfr,
            "last_epoch": self.current_epoch - 1,
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()
                     if v is None or isinstance(v, (bool, int, float, str, Path))},
            "resume": state,
        }

    def training_state(self):
        """Everything that decides the rest of the run; `load_training_state` takes it back."""
        rank_state = {"torch": torch.get_rng_state(), "coins": self.coins.get_state(), "taught": self.taught, "tossed": self.tossed,
                      "pool": self.pool.state_dict() if self.pool else None,
                      "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None}
        ranks = [rank_state]
        if self.world > 1:
            ranks = [None] * self.world
            dist.all_gather_object(ranks, rank_state)
        return {
            "weights": self.network_state(), "ema": self.ema, "optimizer": self.optim.state_dict(),
            "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(),
            "epoch": self.current_epoch, "kl_epoch": self.kl_annealing.current_epoch,
            "step": self.step, "steps_done": self.steps_done, "epoch_coin": self.epoch_coin,
            "totals": self.totals, "learning_rate_sum": self.learning_rate_sum, "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds, "share_done": self.share_done(), "best_psnr": self.best_psnr,
            "history": [dict(row) for row in self.history], "train_frames": self.train_frames, "precision": self.precision,
            "num_epoch": self.args.num_epoch, "asked_epochs": self.asked_epochs, "given": sorted(set(self.args.given) - options.OF_THE_MACHINE),
            "device": self.device.type, "ranks": ranks,
        }

    def load_training_state(self, state):
        """Go on exactly where `training_state` was taken."""
        self.load_network_state(state["weights"])
        for name, value in (state["ema"] or {}).items() if self.ema is not None else ():
            self.ema[name].copy_(value)
        self.load_moments(state["optimizer"])
        for group, saved in zip(self.optim.param_groups, state["optimizer"]["param_groups"]):
            group.update(lr=saved["lr"], initial_lr=saved["initial_lr"])
        self.scheduler.load_state_dict(state["scheduler"])
        if (self.args.precision == "auto" and self.precision != state["precision"] and state["device"] == self.device.type
                and (state["precision"] != "bf16" or has_bf16(self.device))):
            # a timing must not change the rest of a run
            self.__dict__["_precision"], self.precision_reason = state["precision"], f"{state['precision']} as before the stop"
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if state["scaler"]:  # empty where nothing was scaled
            self.scaler.load_state_dict(state["scaler"])
        self.current_epoch = state["epoch"]
        self.kl_annealing.current_epoch = state["kl_epoch"]
        self.step, self.steps_done, self.epoch_coin = state["step"], state["steps_done"], state["epoch_coin"]
        self.totals = state["totals"].to(self.totals.dtype).to(self.device)
        self.skipped_in_a_row = state["skipped_in_a_row"].to(self.device)
        self.learning_rate_sum, self.seconds, self.best_psnr = state["learning_rate_sum"], state["seconds"], state["best_psnr"]
        self.history = [dict(row) for row in state["history"]]
        if self.rank >= len(state["ranks"]):
            return  # a rank that the run did not have: it draws from its own seed
        own = state["ranks"][self.rank]
        torch.set_rng_state(own["torch"])
        self.coins.set_state(own["coins"])
        self.taught, self.tossed = own["taught"], own["tossed"]
        if own["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.device)
        if self.pool is not None and own["pool"] is not None:
            self.pool.load_state_dict(own["pool"])

    def load_moments(self, optimizer):
        """Take a state_dict's moments, or none where its optimizer was of another kind; settings and memory layout stay this model's."""
        parameters = list(self.parameters())
        squared = [not (self.args.optim == "Muon" and is_matrix(p)) for p in parameters]
        moments = optimizer["state"] if optimizer_fits(optimizer, parameters, squared) else {}
        self.optim.load_state_dict({**self.optim.state_dict(), "state": moments})
        for parameter, state in self.optim.state.items():
            for name in state.keys() & {"exp_avg", "exp_avg_sq"}:  # the fused kernels take both for laid out alike
                state[name] = torch.empty_like(parameter).copy_(state[name])

    def write(self, names):
        """Write the run's checkpoint into save_root under these names; every rank calls it, rank 0 writes."""
        state = self.checkpoint()
        if self.rank == 0:
            for name in names:
                write_checkpoint(Path(self.args.save_root) / name, state)

    def save(self, path):
        """Write a checkpoint to `path`, atomically."""
        self.set_up_training()
        write_checkpoint(path, self.checkpoint())
        print(f"saved {path}")

    def load_checkpoint(self):
        """Load --ckpt_path where it is given: ours, the template's, or another's (see `read_checkpoint`).

        Sets the weights, args.lr, tfr, current_epoch (the one after the checkpoint's last), kl_annealing and the
        optimizer. A training stage that follows goes on exactly where a checkpoint of ours was written.
        """
        if self.args.ckpt_path is None:
            return
        self.read_version = file_version(self.args.ckpt_path)
        loaded = read_checkpoint(self.args.ckpt_path)
        load_weights(self, loaded["state_dict"], self.args.ckpt_path)
        self.ema = self.pool = self.poses = None  # of a stage before this; what is loaded are the weights to validate
        self.set_up_training()
        self.base_lr = self.args.lr
        if "lr" not in self.args.given:
            self.args.lr = loaded.get("lr") or self.args.lr
        self.tfr = loaded["tfr"] if loaded.get("tfr") is not None else self.args.tfr
        self.current_epoch = int(loaded["last_epoch"]) + 1 if loaded.get("last_epoch") is not None else 0
        self.kl_annealing.current_epoch = self.current_epoch
        self.new_optimizer()
        # a stranger's lr is that of its last epoch; ours is restored with the scheduler when training goes on
        self.scheduler.base_lrs = [self.base_lr if self.args.schedule == "cosine" else
                                   self.args.lr / learning_rate_factor(self.args, self.current_epoch, 0)]
        self.set_learning_rate()
        self.load_moments(loaded["optimizer"])
        resume = loaded.get("resume")
        if isinstance(resume, dict) and {"history", "best_psnr", "train_frames", "ranks"} <= resume.keys():  # a stranger's may be anything
            self.restored = {"weights": loaded.get("train_state_dict", loaded["state_dict"]), "optimizer": loaded["optimizer"], **resume}
            self.history, self.best_psnr = resume["history"], resume["best_psnr"]

    # ------------------------------------------------------------ pictures

    def write_validation(self, plot, gif, table=None):
        """The last validation rollout: PSNR per frame as a plot and a table, pose | prediction | ground truth as a GIF."""
        if table:
            write_csv(table, ("frame", "psnr"), [{"frame": t, "psnr": p} for t, p in enumerate(self.psnr_per_frame, 1)])
        plot_psnr(self.psnr_per_frame, plot)
        self.make_gif([torch.cat(side_by_side, 2) for side_by_side in zip(*self.val_sequence)], gif)

    def make_gif(self, images_list, img_name, duration=GIF_TICK):
        """Write frames (3, H, W) in [0, 1] as a GIF, `duration` milliseconds each. Pillow merges equal neighbours."""
        write_gif(images_list, img_name, duration)

    # ------------------------------------------------------------ bookkeeping

    def teacher_forcing_ratio_update(self):
        """Set tfr to the current epoch's."""
        self.tfr = teacher_forcing_ratio(self.args, self.current_epoch)

    def tqdm_bar(self, mode, pbar, loss, lr=0.0, advance=1):
        """Advance a bar ("train" or "val") and show epoch, lr, teacher forcing, beta and loss (val: PSNR so far)."""
        if pbar is None:
            return
        figure = f"PSNR {float(loss):.2f} dB" if mode == "val" else f"loss {float(loss):.5f}"
        beta = self.kl_annealing.get_beta() if hasattr(self, "kl_annealing") else 1.0
        pbar.set_postfix_str(f"lr {lr:.1e}, tfr {getattr(self, 'tfr', 0.0):.2f}, beta {beta:.2f}, {figure}", refresh=False)
        pbar.update(advance)

    def reset_totals(self):
        """Zero the sums that an epoch's row in the history is made of."""
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        self.totals = torch.zeros(5, dtype=kind, device=self.device)  # loss, mse, kl, steps taken, steps skipped
        self.taught = self.tossed = 0
        self.learning_rate_sum = self.seconds = 0.0
        self.epoch_coin = None

    def note_signal(self, number):
        self.stop_signal = number

    def stop_if_asked(self, alone=False):
        """Raise Stopped after a signal; in a run of several ranks one that all of them agreed on, unless `alone`."""
        asked = self.stop_signal if self.world == 1 or alone else self.agreed
        if asked:
            raise Stopped(asked)

    def stop_if_hopeless(self):
        """UserError after MAX_SKIPPED steps in a row whose gradient was not finite."""
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(f"--lr {self.args.lr:g}, --kl_weight {self.args.kl_weight:g}: the loss was not finite for {int(self.skipped_in_a_row)} steps "
                            f"in a row in epoch {self.current_epoch}; expected smaller ones (what is in {self.args.save_root} is whole)")

    def agree(self):
        """Let all ranks see the same clock, and the same signal if any of them got one. Costs nothing with one rank."""
        if self.clock:
            self.clock.now = self.from_rank_0(time.monotonic())
        self.agreed = self.on_any_rank(self.stop_signal or 0)

    def on_any_rank(self, value):
        """The largest of the whole numbers that the ranks have."""
        if self.world == 1:
            return value
        value = torch.tensor(value, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def from_rank_0(self, value):
        """The number that rank 0 has."""
        if self.world == 1:
            return value
        value = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(value, 0)
        return value.item()


class Clock:
    """The time of a run with --max_minutes. `end` and `now` are of time.monotonic(); the last validation must fit before end."""

    def __init__(self, end, now, validation, share=0.0):
        self.end, self.start_share = end, share
        self.start = self.now = now
        self.fitted = False
        self.reserve(validation)

    def reserve(self, validation):
        """Keep the seconds of the last validation, with a margin for files and a machine that slows down."""
        self.deadline = self.end - 1.2 * validation - 5

    def over(self):
        return self.now >= self.deadline

    def share(self):
        """The share of the run that is over, from what it was at the start to 1 at the deadline."""
        gone = (self.now - self.start) / max(1e-9, self.deadline - self.start)
        return self.start_share + (1 - self.start_share) * min(1.0, max(0.0, gone))


# ---------------------------------------------------------------- the command line

def build_parser():
    """The flags of Trainer.py."""
    parser = options.build_parser("Trainer.py", "Train the pose-conditioned VAE, or validate a checkpoint with --test.")
    parser.add_argument("--store_visualization", action="store_true", help="keep a GIF and a PSNR plot of every epoch's validation")
    return parser


def adopt_settings(args, names=None):
    """Take the settings of the checkpoint at args.ckpt_path for flags that are not on the command line.

    names: the flags to take; None takes all that say what to train. A given flag that differs is said. Returns all of its settings.
    """
    loaded = read_checkpoint(args.ckpt_path)
    settings = loaded["args"] if isinstance(loaded.get("args"), dict) else {}
    settings = build_parser().accept({**settings, **sizes(loaded)}, args.ckpt_path)
    names = settings.keys() - options.OF_THE_MACHINE if names is None else names & settings.keys()
    if "recipe" in args.given and settings.get("recipe") != args.recipe:
        names = names - options.RECIPES["pool"].keys()  # another recipe was asked for: what it sets stays
    for name in sorted(names):
        if name not in args.given:
            setattr(args, name, settings[name])
            if name == "DR" and settings[name] and not os.path.isdir(settings[name]):
                raise UserError(f"--DR {settings[name]}: what {args.ckpt_path} was trained on is not here; expected the data folder as --DR")
        elif getattr(args, name) != settings[name]:
            say(f"--{name} {getattr(args, name)}: the checkpoint has {settings[name]}")
    # a flag of the command line that began the run stays one
    before = loaded["resume"].get("given") if isinstance(loaded.get("resume"), dict) else None
    args.given = sorted({*args.given, *(name for name in (before if isinstance(before, list) else ()) if name in names)})
    return settings


def require(args, *flags):
    for flag in flags:
        if getattr(args, flag) is None:
            raise UserError(f"--{flag}: is missing; expected a path")


def resume_command():
    words = [word for word in sys.argv if word != "--resume"] + ["--resume"]
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    return (f"torchrun --nproc_per_node={ranks} " if ranks else "python ") + shlex.join(words)


def join_processes(args):
    """(rank, world) under torchrun, else (0, 1). UserError where --gpu wants more than are there."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.gpu > 1 and world != args.gpu:
        raise UserError(f"--gpu {args.gpu}: expected to be started as torchrun --nproc_per_node={args.gpu} {shlex.join(sys.argv)}")
    if world == 1:
        return 0, 1
    if args.device is None and not torch.cuda.is_available():
        args.device = "cpu"
    elif args.device in (None, "cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    elif args.device.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError(f"--device {args.device}: can't be shared by {os.environ['LOCAL_WORLD_SIZE']} processes; expected --device cuda, "
                        f"which gives each its own")
    device = pick_device(args.device)
    # a rank waits for rank 0's validation, which may be long
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), world


def leave(status):
    """Exit. After an error that the other ranks may not have had, at once: ending their group in good order would wait for them."""
    if dist.is_available() and dist.is_initialized():
        if status not in (0, *cli.INTERRUPTED.values()):
            sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


def main(argv=None):
    began = time.monotonic()
    check_torch()
    args = build_parser().parse_args(argv)
    require(args, "save_root")
    check_save_root(args.save_root)
    last = Path(args.save_root) / "last.ckpt"
    if args.resume and last.exists():
        args.ckpt_path = str(last)
    if args.test:
        require(args, "ckpt_path")
    if args.ckpt_path:
        adopt_settings(args)
    require(args, "DR")
    rank, world = join_processes(args)
    model = VAE_Model(args)
    model.rank, model.world, model.began = rank, world, began
    model.load_checkpoint()
    if args.resume and not last.exists():
        say(f"--resume: there is no {last}, so this starts from " + (args.ckpt_path or "scratch"))
    if args.test:
        if rank == 0:
            with cli.catching_signals(cli.stop):
                psnr, root = model.eval(), Path(args.save_root)
                if (root / "history.csv").exists():  # a run's own files are of its best epoch
                    root = make_folder(root / "test")
                model.write_validation(root / "psnr_per_frame.png", root / "val_pred.gif", root / "psnr_per_frame.csv")
            say(f"validation PSNR mean {psnr:.2f} min {min(model.psnr_per_frame):.2f} last {model.psnr_per_frame[-1]:.2f} dB, in {root}")
    elif model.current_epoch >= args.num_epoch or model.ended_by_the_clock():
        say(f"{args.ckpt_path}: all {model.current_epoch} epochs are done; a larger --num_epoch trains on")
    else:
        model.training_stage()


if __name__ == "__main__":
    cli.run(main, leave)
