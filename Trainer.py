"""Train the pose-conditioned VAE of the lab: one image and 630 poses in, the 629 frames that follow out.

    python Trainer.py --DR data --save_root ckpt --fast_train            # the recommended command
    python Trainer.py --DR data --save_root ckpt --fast_train --max_minutes 60
    python Trainer.py --DR data --save_root ckpt --fast_train --resume   # after a stop, crash or kill
    python Trainer.py --DR data --save_root out --ckpt_path ckpt/best.ckpt --test        # validate
    torchrun --nproc_per_node=8 Trainer.py --DR data --save_root ckpt --gpu 8            # eight GPUs

Reads top to bottom as the algorithm: losses and PSNR, then `VAE_Model` with its training step, its
rollout, its schedules, its training stage and its checkpoints, and the command line at the end. The
rollout pool, which gives the default recipe its previous frames, is in dataloader.py; what is not
about this method (flags, files, hardware, ranks, logs) is in utils/.
"""

import argparse
import math
import shlex
import time
import warnings
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint as recompute

import dataloader
from dataloader import Dataset_Dance, Frames, RolloutPool, frame_transform
from modules import Decoder_Fusion, Gaussian_Predictor, Generator, Label_Encoder, RGB_Encoder
from utils import cli, distributed, logger, options, session
from utils.checkpoint import (
    NETWORKS, adopt_settings, file_version, load_weights, read_checkpoint, sizes, write_checkpoint)
from utils.cli import UserError, progress, say
from utils.files import check_save_root, make_folder
from utils.hardware import (
    Float32Conv2d, channels_last, check_torch, enough_memory, in_pieces, join, pick_device,
    pick_precision)
from utils.metrics import psnr, warn_of_logits
from utils.muon import Muon
from utils.schedules import (
    WARM_UP, beta_at, continuous, data_share, kl_annealing, learning_rate_factor,
    teacher_forcing_ratio)
from utils.training_state import TrainingState, capture, load_optimizer

CLIP_NORM = 1.0     # gradient norm, the template's
ROLLOUT_BLOCK = 32  # frames between two looks at a rollout: bar, signals, non-finite values
POSE_SAMPLE = 4096  # training poses for BatchNorm recalibration
NOISE_MSE = 1e-5    # 50 dB: errors below it hardly count
GIF_TICK = 40       # milliseconds a frame, the template's
OUTPUTS = {"none": lambda x: x, "clamp": lambda x: x.clamp(0, 1), "sigmoid": torch.sigmoid}

# with fp16, whose scale has to be found, PyTorch takes a skipped first step for a wrong order of calls
warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")


# ---------------------------------------------------------------- losses and metric

def Generate_PSNR(imgs1, imgs2, data_range=1.):
    """Return the peak signal-to-noise ratio in dB over the whole tensor, at most 100."""
    return psnr(F.mse_loss(imgs1, imgs2) / data_range ** 2)


def kl_criterion(mu, logvar, batch_size):
    """Return KL(q || N(0, I)) summed over latent elements, averaged over the batch, in nats.

    mu, logvar: (B, N_dim, H, W). Kingma & Welling 2014, appendix B.
    """
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / batch_size


def log_mse(frames, truth):
    """Return 0.001 * log(1 + MSE / 1e-5), averaged over frames: a decibel counts alike at every PSNR.

    frames, truth: (B, 3, H, W) in [0, 1]. The gradient is the MSE's at 30 dB, and larger at smaller
    errors. Rybkin et al. 2021, the optimal sigma of a calibrated decoder.
    """
    mse = (frames - truth).square().mean((1, 2, 3))
    return 1e-3 * torch.log1p(mse / NOISE_MSE).mean()


# ---------------------------------------------------------------- the model

@contextmanager
def evaluating(*models):
    """Inside, BatchNorm uses its running statistics; afterwards each model is in its former mode."""
    modes = [model.training for model in models]
    for model in models:
        nn.Module.train(model, False)
    try:
        yield
    finally:
        for model, mode in zip(models, modes):
            nn.Module.train(model, mode)


class VAE_Model(nn.Module):
    """The conditional VAE: its training step, rollout, training stage and checkpoints.

    args: a Namespace of `build_parser()`, or any other: a flag it lacks has the parser's default, and
    without `recipe` it trains the template's way. `state` is what a resume needs, `session` what ends
    with the process. They and the optimizer are made on first use, because a subclass may never run
    this __init__ but build the five networks itself, as the template's Tester does.
    UserError for a device that is missing and for values out of range.
    """

    initialized = False  # whether __init__ ran

    def __init__(self, args):
        super().__init__()
        self.initialized = True
        self.args = args
        args.device = str(pick_device(args.device))
        torch.manual_seed(args.seed)
        names = "F_dim", "L_dim", "N_dim", "D_out_dim"
        flags = ", ".join(f"--{name} {getattr(args, name)}" for name in names)
        with enough_memory(flags, "smaller ones"):
            latent = args.F_dim + args.L_dim
            self.frame_transformation = RGB_Encoder(3, args.F_dim)
            self.label_transformation = Label_Encoder(3, args.L_dim)
            self.Gaussian_Predictor = Gaussian_Predictor(latent, args.N_dim)
            self.Decoder_Fusion = Decoder_Fusion(latent + args.N_dim, args.D_out_dim)
            self.Generator = Generator(args.D_out_dim, 3)
            for layer in (self.label_transformation[1], self.Generator[-1]):
                layer.__class__ = Float32Conv2d  # the same weights, by the same names
            self.to(args.device, memory_format=torch.channels_last)
        self.mse_criterion = nn.MSELoss()
        self.kl_annealing = kl_annealing(args)
        self.train_vi_len, self.val_vi_len = args.train_vi_len, args.val_vi_len
        self.batch_size, self.tfr_sde, self.tfr_d_step = args.batch_size, args.tfr_sde, args.tfr_d_step

    @property
    def args(self):
        """The flags, complete."""
        return self.__dict__["_args"]

    @args.setter
    def args(self, args):
        self.__dict__["_args"] = self.flags().fill(args)

    @staticmethod
    def flags():
        """Return the parser whose defaults complete `args`."""
        return build_parser()

    @cached_property
    def state(self):
        """The TrainingState."""
        sampler = torch.Generator().manual_seed(self.args.seed)
        return TrainingState(num_epoch=self.args.num_epoch, sampler=sampler)

    @cached_property
    def session(self):
        """The Session."""
        return session.Session()

    @cached_property
    def kl_annealing(self):
        """The schedule of beta by whole epochs."""
        return kl_annealing(self.args, self.current_epoch)

    @cached_property
    def tfr(self):
        """The probability of teacher forcing in the next step."""
        return teacher_forcing_ratio(self.args, self.schedule_epoch())

    @cached_property
    def optim(self):
        """The optimizer."""
        kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "Muon": Muon}[self.args.optim]
        fused = self.device.type in ("cuda", "cpu")
        return kind(self.parameters(), lr=self.args.lr, fused=fused)

    @cached_property
    def scheduler(self):
        """The learning rate's schedule."""
        return torch.optim.lr_scheduler.LambdaLR(self.optim, lambda _: self.learning_rate_factor())

    @cached_property
    def scaler(self):
        """The scale of the loss in fp16; without effect in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @cached_property
    def picked_precision(self):
        """(fp32, bf16 or fp16, why): --precision, or what is fastest on this machine."""
        return distributed.broadcast_object(pick_precision(self.args.precision, self.device))

    @property
    def precision(self):
        """fp32, bf16 or fp16."""
        return self.picked_precision[0]

    @property
    def current_epoch(self):
        """The epoch that is trained."""
        return self.state.epoch

    @current_epoch.setter
    def current_epoch(self, epoch):
        self.state.epoch = epoch

    @property
    def device(self):
        """The device of the networks."""
        return next(self.frame_transformation.parameters()).device

    def load_state_dict(self, *args, **kwargs):
        """Load weights as every module does, and see `evaluate_until_trained`."""
        incompatible = super().load_state_dict(*args, **kwargs)
        self.evaluate_until_trained()
        return incompatible

    def evaluate_until_trained(self):
        """Leave training mode until the next training step, where our __init__ never ran.

        Such a subclass, as the template's Tester, never leaves training mode itself, in which
        BatchNorm normalizes each pose alone.
        """
        if not self.initialized:
            nn.Module.train(self, False)
            self.session.evaluates = True

    # ------------------------------------------------------------ a training step: figure 2 (a)

    def forward(self, img, label, adapt_TeacherForcing=False):
        """Predict frames 1 to T - 1 of a batch of windows, frame t from frame t - 1.

        img, label: (B, T, 3, H, W), float32 in [0, 1]. adapt_TeacherForcing: True or False for the
        whole window, or bool (T,): whether frame t is predicted from the true frame t - 1 (t = 1
        always is). Returns (loss, mse, kl, generated): means over the predicted frames, kl in nats,
        and frame T - 1 as generated (B, 3, H, W). `losses` holds every term by name.
        """
        batch, length = img.shape[:2]
        teacher_forced = torch.as_tensor(adapt_TeacherForcing).expand(length).tolist()
        # (B, T, 3, H, W) -> (T * B, 3, H, W): with time in the batch, tensors stay channels-last
        img, label = (channels_last(x.transpose(0, 1).flatten(0, 1)) for x in (img, label))
        apply = partial(self.saving_memory, batch)

        # encode all poses and frames, and infer the posterior of frames 1 to T - 1
        pose = self.label_transformation(label[batch:])               # L_dim channels
        feature = apply(self.frame_transformation, img).split(batch)  # F_dim channels, by t
        z, mu, logvar = apply(self.Gaussian_Predictor, join(feature[1:]), pose)
        pose, z = (dict(enumerate(x.split(batch), 1)) for x in (pose, z))  # by t

        # predict from true frames, all at once, and then from generated frames, one after the other
        forced = [t for t in range(1, length) if t == 1 or teacher_forced[t]]
        previous = join([feature[t - 1] for t in forced])
        frames = apply(self.decode, previous, *(join([x[t] for t in forced]) for x in (pose, z)))
        generated = dict(zip(forced, frames.split(batch)))
        for t in range(1, length):
            if t not in generated:
                generated[t] = apply(self.next_frame, generated[t - 1], pose[t], z[t])

        frames = join([generated[t] for t in range(1, length)]).float()  # ((T - 1) * B, 3, H, W)
        self.losses = self.loss_terms(frames, img[batch:], mu.float(), logvar.float())
        return (*(self.losses[name] for name in ("loss", "mse", "kl")), generated[length - 1])

    def loss_terms(self, frames, truth, mu, logvar):
        """Return the loss, reconstruction + beta * kl_weight * kl, and its terms by name.

        frames, truth: (N, 3, H, W); mu, logvar: (N, N_dim, H, W). Every term is logged. A further one
        is added to `loss` and to the dict here, and to the columns in utils/files.py.
        """
        mse = getattr(self, "mse_criterion", F.mse_loss)(frames, truth)
        kl = kl_criterion(mu, logvar, len(mu))
        reconstruction = log_mse(frames, truth) if self.args.objective == "log_mse" else mse
        loss = reconstruction + self.beta() * self.args.kl_weight * kl
        return {"loss": loss, "reconstruction": reconstruction, "mse": mse, "kl": kl}

    def next_frame(self, previous, pose, z):
        """Return the frame that follows `previous` (B, 3, H, W): one step of a rollout."""
        return self.decode(self.frame_transformation(previous), pose, z)

    def decode(self, previous, pose, z):
        """Return frames (B, 3, H, W) from features of the previous frame and the pose, and z."""
        z = z.to(previous.dtype)  # a float32 input would make the concatenation float32
        return OUTPUTS[self.args.output](self.Generator(self.Decoder_Fusion(previous, pose, z)))

    def saving_memory(self, batch, function, *inputs):
        """Apply a function in pieces that suit the device.

        With --checkpoint_steps a piece is a time step, recomputed in the backward pass.
        """
        if self.args.checkpoint_steps and torch.is_grad_enabled():
            function = partial(recompute, function, use_reentrant=False)
            return in_pieces(function, *inputs, size=batch)
        return in_pieces(function, *inputs)

    def training_one_step(self, img, label, adapt_TeacherForcing):
        """Learn from a batch of windows: losses, backward, step, log. Returns the loss.

        Arguments as of `forward`. A loss or gradient that is not finite changes nothing.
        """
        if self.session.evaluates:
            nn.Module.train(self, True)
            self.session.evaluates = False
        self.optim.zero_grad(set_to_none=True)
        statistics = [buffer.clone() for buffer in self.buffers()]  # BatchNorm's
        img, label = (x.to(self.device, non_blocking=True) for x in (img, label))
        with self.autocast():
            # not self(...): a subclass in the template's way overrides forward
            forward = self.session.parallel or partial(VAE_Model.forward, self)
            loss, _, _, self.generated = forward(img, label, adapt_TeacherForcing)
        # a loss may overflow where its gradient does not; NaN tells every rank without a wait
        valid = torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss)
        self.scaler.scale(loss).backward(valid)
        finite = self.optimizer_step()
        with torch.no_grad():
            for buffer, before in zip(self.buffers(), statistics):
                buffer.copy_(torch.where(finite, buffer, before))
        self.generated = self.generated.detach()
        self.log_step(finite)
        return loss.detach()

    def optimizer_step(self):
        """Clip the gradient's norm, step, and average the weights; skip where it is not finite.

        Returns whether it was finite, a bool tensor.
        """
        self.scaler.unscale_(self.optim)
        finite = nn.utils.clip_grad_norm_(self.parameters(), CLIP_NORM).isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optim)
            self.scaler.update()
        elif self.device.type == "cuda":  # the fused kernel reads the flag: the host need not wait
            self.optim.grad_scale, self.optim.found_inf = None, (~finite).float()
            self.optim.step()
        elif finite:
            self.optim.step()
        if self.state.average is not None:  # with TensorFlow's num_updates: short runs forget their start
            decay = min(self.args.ema, (1 + self.state.steps_done) / (10 + self.state.steps_done))
            weights = [p.detach() for p in self.parameters()]
            torch._foreach_lerp_(list(self.state.average.values()), weights, 1 - decay)
        return finite

    def log_step(self, finite):
        """Add the step's losses and settings to the means of the epoch and of the steps."""
        figures = torch.stack([term.detach() for term in self.losses.values()])
        figures = figures.to(torch.float32 if self.device.type == "mps" else torch.float64)
        counts = torch.stack([finite, ~finite]).to(figures)  # steps taken, steps skipped
        figures = torch.cat([torch.where(finite, figures, 0.0), counts])
        lr = self.optim.param_groups[0]["lr"]
        settings = {"lr": lr, "tfr": self.tfr, "beta": self.beta(), **self.session.drawn}
        for means in (self.state.epoch_means, self.state.step_means):
            means.add(self.losses, figures, settings)
        self.state.skipped_in_a_row = (self.state.skipped_in_a_row + 1) * ~finite

    # ------------------------------------------------------------ the rollout: figure 2 (b)

    def rollout(self, first, label, on_block=None):
        """Generate sequences from their first frames and poses; validation and testing share it.

        first: (S, 3, H, W), label: (S, T, 3, H, W), float32 in [0, 1]. Returns (S, T - 1, 3, H, W) in
        [0, 1], on the CPU. z is drawn from N(0, I) at every step, for each sequence from a generator
        of its own. The frame fed back is the one returned, clamped; with several checkpoints it is
        the mean of their predictions. With --rollouts N each of N feeds back its own, and their mean
        is returned. on_block(t, frames) is called every few frames with those made since, t of them
        so far. UserError names sequence and frame of a non-finite prediction.
        """
        args, device, models = self.args, self.device, [self, *self.session.ensemble]
        count, length, lanes = *label.shape[:2], args.rollouts
        noise = [torch.Generator(device).manual_seed(args.seed + i)
                 for _ in range(count) for i in range(lanes)]
        previous = first.to(device).repeat_interleave(lanes, 0)
        blocks = []
        size = f"{count} sequence(s) of {label.shape[-1]}x{label.shape[-2]}"
        memory = enough_memory(f"--rollouts {lanes}, {size}", "fewer, or --device cpu")
        # inference mode costs least, but in it autocast casts every weight again for every frame
        no_grad = torch.inference_mode() if self.precision == "fp32" else torch.no_grad()
        with memory, evaluating(*models), self.autocast(), no_grad:
            for start in range(1, length, ROLLOUT_BLOCK):
                poses = label[:, start:start + ROLLOUT_BLOCK]
                frames, finite = self.rollout_block(models, previous, poses, noise, start == 1)
                if not finite.all():
                    t, lane = (~finite).nonzero()[0].tolist()
                    raise UserError(
                        f"rollout of sequence {lane // lanes}: frame {start + t} is not finite; expected "
                        f"weights that give finite frames (train longer, or with a smaller --lr)")
                previous = frames[-1]
                frames = frames.transpose(0, 1).unflatten(0, (count, lanes)).mean(1)
                blocks.append(frames.cpu())  # (S, t, 3, H, W)
                if on_block:
                    on_block(start + frames.shape[1] - 1, blocks[-1])
        return torch.cat(blocks, 1)

    def rollout_block(self, models, previous, label, noise, begins):
        """Generate the frames after `previous` (N, 3, H, W), along poses (S, t, 3, H, W).

        noise: a generator for each of the N rollouts. begins: whether `previous` is a given frame,
        not a generated one. Returns frames (t, N, 3, H, W) in [0, 1], and
        whether each was finite, bool (t, N) on the CPU.
        """
        label = label.transpose(0, 1).to(self.device)
        shape = max(model.args.N_dim for model in models), *label.shape[-2:]
        if self.args.z == "prior":
            z = [torch.randn(len(label), *shape, generator=g, device=self.device) for g in noise]
            z = torch.stack(z, 1)  # (t, N, N_dim, H, W)
        else:
            z = torch.zeros(len(label), len(noise), *shape, device=self.device)
        poses = []
        for model in models:
            pose = model.label_transformation(channels_last(label.flatten(0, 1)))
            pose = pose.unflatten(0, label.shape[:2])
            poses.append(pose.repeat_interleave(self.args.rollouts, 1))  # (t, N, L_dim, H, W)

        frames, finite = [], []
        for t in range(len(label)):
            predicted = [
                model.next_frame(channels_last(previous), channels_last(pose[t]),
                                 channels_last(z[t, :, :model.args.N_dim])).float()
                for model, pose in zip(models, poses)]
            given = previous
            previous = predicted[0] if len(models) == 1 else torch.stack(predicted).mean(0)
            if begins and t == 0:
                warn_of_logits(self, previous, given)
            finite.append(previous.isfinite().flatten(1).all(1))
            previous = previous.clamp(0, 1)
            frames.append(previous)
        return torch.stack(frames), torch.stack(finite).cpu()

    def val_one_step(self, img, label):
        """Roll out a batch of sequences, img and label (B, T, 3, H, W).

        Returns (loss, T - 1 PSNRs in dB), means over the batch.
        """
        squared = []

        def look(done, frames):
            truth = img[:, 1 + done - frames.shape[1]:1 + done].cpu()
            squared.append((frames - truth).square().mean((2, 3, 4)))
            so_far = psnr(torch.cat(squared, 1)).mean()
            self.tqdm_bar("val", self.session.bar, so_far, advance=frames.shape[1])
            self.session.stop.check(alone=True)

        self.predicted = self.rollout(img[:, 0], label, look)  # (B, T - 1, 3, H, W), for figures
        squared = torch.cat(squared, 1)
        return squared.mean(), psnr(squared).mean(0).tolist()

    def eval(self):
        """Run one validation rollout of the validation sequence. Returns the mean PSNR in dB.

        This is the template's name for its validation loop. It hides nn.Module.eval(), so modes are
        switched with nn.Module.train(model, flag) alone. Makes save_root.
        """
        losses, psnrs = [], []
        loader = self.val_dataloader()
        if self.args.save_root is not None:
            make_folder(self.args.save_root)
        bar = progress(total=len(loader) * (self.args.val_vi_len - 1), unit="frame", leave=False,
                       desc=f"val   {self.current_epoch}")
        with self.validated_weights(), bar as self.session.bar:
            for img, label in loader:
                loss, psnr_per_frame = self.val_one_step(img, label)
                losses.append(loss)
                psnrs.append(psnr_per_frame)
        self.session.bar = None
        self.val_loss = float(torch.stack(losses).mean())
        self.psnr_per_frame = np.mean(psnrs, axis=0).tolist()
        self.val_sequence = label[0, 1:].cpu(), self.predicted[0], img[0, 1:].cpu()
        return float(np.mean(self.psnr_per_frame))

    def autocast(self):
        """Return the context in which the networks run: mixed precision where `precision` has it."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    # ------------------------------------------------------------ averaged weights

    @contextmanager
    def validated_weights(self):
        """Inside, the model holds the weights that are validated and kept: averaged ones (EMA).

        BatchNorm's statistics are recalibrated for them: running averages lag behind moving weights.
        """
        average, poses = self.state.average, self.session.poses
        if average is None and poses is None:
            yield
            return
        raw = self.network_state()
        with torch.no_grad():
            for name, value in (average or {}).items():
                self.get_parameter(name).copy_(value)
        if poses is not None:
            self.recalibrate_batchnorm(poses)
        try:
            yield
        finally:
            self.load_network_state(raw)

    @torch.no_grad()
    def recalibrate_batchnorm(self, poses):
        """Compute BatchNorm's statistics over poses, uint8 (N, 3, H, W) (Wu & Johnson 2021)."""
        blocks = max(1, len(poses) // 128)
        stem = nn.Sequential(*list(self.label_transformation)[:3])
        # a block is every blocks-th pose, so that means are alike and variances may be averaged
        parts = (poses[i::blocks].float().div(255).to(self.device) for i in range(blocks))
        update_bn(map(channels_last, parts), stem)

    def network_state(self):
        """Return a copy of the five networks' weights, by the keys that a checkpoint has."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()
                if name.split(".")[0] in NETWORKS}

    @torch.no_grad()
    def load_network_state(self, weights):
        """Take the weights of `network_state`."""
        own = self.state_dict()
        for name, value in weights.items():
            own[name].copy_(value)

    # ------------------------------------------------------------ data

    def dataset(self, mode, video_len, partial=1.0):
        """Return the Dataset_Dance of a split, whose frames are decoded once unless --no_cache."""
        args, decoded = self.args, self.session.frames
        options.require(args, "DR")
        size = args.frame_H, args.frame_W
        if mode not in decoded and not args.no_cache:
            frames = Frames(args.DR, mode, *size, args.cache_dir, args.num_workers)
            decoded[mode] = frames.to(self.device)
        transform = frame_transform(*size)
        return Dataset_Dance(args.DR, transform, mode, video_len, partial, decoded.get(mode))

    def train_dataloader(self, skip=0):
        """Return batches of this epoch's windows in order, this rank's share, from batch `skip` on."""
        args, rank, world = self.args, distributed.rank(), distributed.world()
        dataset = self.dataset("train", args.train_vi_len, data_share(args, self.current_epoch))
        order = range(rank, len(dataset) - len(dataset) % world, world)[skip * args.batch_size:]
        return dataloader.window_loader(dataset, args.batch_size, args.num_workers, order)

    def val_dataloader(self):
        """Return batches of one validation sequence of val_vi_len frames."""
        dataset = self.dataset("val", self.args.val_vi_len)
        return dataloader.window_loader(dataset, 1, min(1, self.args.num_workers))

    def batches(self, skip=0):
        """Yield this epoch's (img, label, teacher_forced (T,)), from batch `skip` on."""
        args, pool = self.args, self.state.pool
        if pool is None:
            for img, label in self.train_dataloader(skip):
                yield img, label, self.sample_teacher_forcing(args.train_vi_len)
            return
        for _ in range(skip, self.steps_in(self.current_epoch)):
            in_window = self.sample_teacher_forcing(args.train_vi_len)
            restarts = self.sample_teacher_forcing(args.batch_size, of_rollouts=True)
            yield *pool.draw(args.batch_size, args.train_vi_len, args.next_share, restarts), in_window

    def sample_teacher_forcing(self, count, of_rollouts=False):
        """Draw Bernoulli samples with probability `tfr`, bool (count,): one an epoch, a batch, or each.

        of_rollouts: a sample is a rollout of the pool; else a frame of a window, whose first two do
        not count in tf_share: frame 0 is given, and frame 1 has a given previous frame.
        """
        self.teacher_forcing_ratio_update()
        state, coin = self.state, self.args.tf_coin
        if state.epoch_sample is None:
            state.epoch_sample = float(torch.rand(1, generator=state.sampler))
        if coin == "epoch":
            uniform = torch.full((count,), state.epoch_sample)
        else:
            size = count if coin == "frame" else 1
            uniform = torch.rand(size, generator=state.sampler).expand(count)
        teacher_forced = uniform < self.tfr
        counted = teacher_forced if of_rollouts else teacher_forced[2:]
        drawn = self.session.drawn if of_rollouts else {"forced": 0, "drawn": 0}
        self.session.drawn = {"forced": drawn["forced"] + int(counted.sum()),
                              "drawn": drawn["drawn"] + len(counted)}
        return teacher_forced

    def steps_in(self, epoch):
        """Return the training steps of an epoch on this rank."""
        args, world = self.args, distributed.world()
        frames = int(self.state.train_frames * data_share(args, epoch))
        if not args.pool:
            return frames // args.train_vi_len // world // args.batch_size
        return max(1, frames // (args.batch_size * (args.train_vi_len - 1) * world))

    # ------------------------------------------------------------ schedules: utils/schedules.py

    def share_done(self):
        """Return the share of the run that is done: by its steps, or by the time it is fitted to."""
        budget, total = self.session.budget, self.session.total_steps
        if budget and budget.fitted:
            return budget.share()
        return self.state.steps_done / total if total else 0.0

    def schedule_epoch(self):
        """Return the epoch that schedules go by: continuous in the pool's training stage, else whole."""
        if continuous(self.args) and self.session.total_steps:
            return self.share_done() * self.args.num_epoch
        return self.current_epoch

    def beta(self):
        """Return beta in [0, 1] of the next step; the KL term's weight is beta * kl_weight."""
        if continuous(self.args) and self.session.total_steps:
            return beta_at(self.kl_annealing.args, self.schedule_epoch())
        return self.kl_annealing.get_beta()

    def teacher_forcing_ratio_update(self):
        """Set tfr to that of the next step."""
        self.tfr = teacher_forcing_ratio(self.args, self.schedule_epoch())

    def learning_rate_factor(self):
        """Return what --lr is multiplied with in the next step; its peak outside a training stage."""
        share = self.share_done() if self.session.total_steps else WARM_UP
        return learning_rate_factor(self.args, self.current_epoch, share)

    def set_learning_rate(self):
        """Give the optimizer the learning rate of the next step."""
        for group, peak in zip(self.optim.param_groups, self.scheduler.base_lrs):
            group["lr"] = peak * self.learning_rate_factor()

    # ------------------------------------------------------------ the training stage

    def training_stage(self):
        """Train from the current epoch to the last; after each, validate, record and save.

        A signal of cli.INTERRUPTED saves last.ckpt and raises Stopped. UserError for data that can't
        be used, a save_root that another run holds, and losses that stay non-finite.
        """
        self.session.began = self.session.began or time.monotonic()
        with cli.catching_signals(cli.stop):
            self.open_data()
        make_folder(self.args.save_root)
        with session.guarded(self):
            session.prepare(self)
            while self.current_epoch < self.state.num_epoch:
                self.train_epoch()
                psnr_mean = session.validate(self)
                self.end_epoch(psnr_mean)
            logger.enlarge(self)
        say(f"done: {self.current_epoch} epochs, best validation PSNR {self.state.best_psnr:.2f} dB, "
            f"in {self.args.save_root}")

    def open_data(self):
        """Decode the data, average the weights and start the pool, before anything is written."""
        args, state = self.args, self.state
        options.require(args, "DR", "save_root")
        if args.tensorboard:
            logger.tensorboard_writer()
        Dataset_Dance(args.DR, None, "val", args.val_vi_len)  # what needs no decoding first
        # the epochs that see least data need a batch, too
        share = min(data_share(args, e) for e in (self.current_epoch, args.num_epoch - 1))
        share = 1.0 if args.pool else share
        windows = len(Dataset_Dance(args.DR, None, "train", args.train_vi_len, share))
        dataloader.check_batch_size(args, windows, distributed.world())

        self.dataset("val", args.val_vi_len)
        dataset = self.dataset("train", args.train_vi_len)
        state.train_frames = dataset.n_frames
        if args.refresh_norm:
            self.session.poses = dataloader.sample_poses(dataset, POSE_SAMPLE, args)
        if args.ema and state.average is None:
            state.average = {name: p.detach().clone() for name, p in self.named_parameters()}
        if args.pool:
            self.session.clips = dataloader.clips_of(dataset, args)
            seed = args.seed + distributed.rank()
            state.pool = RolloutPool(dataset, self.session.clips, args.pool, seed, self.device)

    def train_epoch(self):
        """Do the rest of the current epoch's training steps."""
        state, budget = self.state, self.session.budget
        steps, began = self.steps_in(self.current_epoch), time.monotonic() - state.seconds
        # where time is left in a run fitted to it, the last epoch is repeated
        repeats = budget and budget.fitted and self.current_epoch == state.num_epoch - 1
        with progress(total=None if repeats else steps, initial=state.step, unit="step", leave=False,
                      disable=distributed.rank() > 0,
                      desc=f"train {self.current_epoch}/{state.num_epoch}") as bar:
            while True:
                for img, label, teacher_forced in self.batches(state.step % steps if repeats else state.step):
                    loss = self.training_one_step(img, label, teacher_forced)
                    if state.pool is not None:
                        state.pool.put(self.generated)
                    state.step, state.steps_done = state.step + 1, state.steps_done + 1
                    self.scheduler.step()
                    state.seconds = time.monotonic() - began
                    session.end_step(self, loss, bar, last=state.step % steps == 0)
                    if budget and budget.over():
                        return
                if not repeats:
                    return

    def end_epoch(self, psnr_mean):
        """Record the epoch that was trained and validated, advance to the next, write the files."""
        args, state, epoch = self.args, self.state, self.current_epoch
        # a run that is resumed in another folder has its best there too
        best = psnr_mean > state.best_psnr or not (Path(args.save_root) / "best.ckpt").exists()
        if best:
            state.best_psnr = psnr_mean
        if distributed.rank() == 0:
            state.history.append(logger.epoch_row(self, psnr_mean))
        state.next_epoch()
        self.kl_annealing.update()
        self.teacher_forcing_ratio_update()
        self.scheduler.step()
        session.agree(self)
        if self.session.budget and self.session.budget.over():
            state.num_epoch = state.epoch
        names = ["best.ckpt"] * best + [f"epoch={epoch}.ckpt"] * (epoch % args.per_save == 0)
        self.write([*names, "last.ckpt"])
        if distributed.rank() == 0:
            logger.write_epoch(self, best)

    # ------------------------------------------------------------ checkpoints

    def checkpoint(self):
        """Return the whole run as one dict of plain types and tensors."""
        with self.validated_weights():
            weights = self.network_state()
        saved, args = capture(self), vars(self.args)
        raw = saved.pop("weights")
        averaged = self.state.average is not None or self.session.poses is not None
        plain = type(None), bool, int, float, str
        given = sorted(set(self.args.given) - options.OF_THE_MACHINE)
        return {
            "state_dict": weights,  # those that are validated
            **({"train_state_dict": raw} if averaged else {}),
            "optimizer": saved.pop("optimizer"),
            "lr": self.scheduler.base_lrs[0],  # the peak: a cosine's end, 0, is of no use to others
            "tfr": self.tfr,
            "last_epoch": self.current_epoch - 1,
            "args": {name: str(value) if isinstance(value, Path) else value
                     for name, value in args.items() if isinstance(value, (*plain, Path))},
            "resume": {**saved, "num_epoch": self.args.num_epoch, "given": given},
        }

    def write(self, names):
        """Write the checkpoint into save_root under these names; every rank calls, rank 0 writes."""
        checkpoint = self.checkpoint()
        if distributed.rank() == 0:
            for name in names:
                write_checkpoint(Path(self.args.save_root) / name, checkpoint)

    def save(self, path):
        """Write a checkpoint to `path`, atomically."""
        write_checkpoint(path, self.checkpoint())
        print(f"saved {path}")

    def load_checkpoint(self):
        """Load --ckpt_path where it is given: ours, the template's, or another's.

        Sets the weights, args.lr, tfr, current_epoch (the one after the checkpoint's last),
        kl_annealing and the optimizer. A training stage that follows resumes exactly where a
        checkpoint of ours was written. Further checkpoints are an ensemble's: see `rollout`.
        """
        args, own = self.args, self.session
        if args.ckpt_path is None:
            return
        path, *others = options.as_list(args.ckpt_path)
        own.version, own.poses = file_version(path), None
        loaded = read_checkpoint(path)
        load_weights(self, loaded["state_dict"], path)
        self.evaluate_until_trained()
        own.ensemble = [load_member(args, other) for other in others]
        for name in ("state", "optim", "scheduler", "scaler"):  # of a stage before this
            self.__dict__.pop(name, None)
        own.lr = args.lr
        if "lr" not in args.given:
            args.lr = loaded["lr"] or args.lr
        self.tfr = args.tfr if loaded["tfr"] is None else loaded["tfr"]
        self.current_epoch = 0 if loaded["last_epoch"] is None else loaded["last_epoch"] + 1
        self.kl_annealing.current_epoch = self.current_epoch
        saved = loaded.get("resume")  # anything in a third-party checkpoint
        ours = isinstance(saved, dict) and {"state", "ranks", "num_epoch"} <= saved.keys()
        # lr is the schedule's peak in ours, in a third-party checkpoint the last epoch's
        factor = 1 if ours else learning_rate_factor(args, self.current_epoch, 0)
        self.scheduler.base_lrs = [own.lr if args.schedule == "cosine" else args.lr / factor]
        self.set_learning_rate()
        load_optimizer(self, loaded["optimizer"])
        if ours:
            weights = loaded.get("train_state_dict", loaded["state_dict"])
            own.saved = {"weights": weights, "optimizer": loaded["optimizer"], **saved}

    # ------------------------------------------------------------ what is shown

    def make_gif(self, images_list, img_name, duration=GIF_TICK):
        """Write frames (3, H, W) in [0, 1] as a GIF, `duration` milliseconds each."""
        logger.write_gif(images_list, img_name, duration)

    def tqdm_bar(self, mode, pbar, loss, lr=0.0, advance=1):
        """Advance a bar ("train" or "val") and show the schedules and the loss (val: PSNR so far)."""
        if pbar is None:
            return
        figure = f"PSNR {loss:.2f} dB" if mode == "val" else f"lr {lr:.1e}, loss {loss:.5f}"
        text = f"tfr {self.tfr:.2f}, beta {self.beta():.2f}, {figure}"
        pbar.set_postfix_str(text, refresh=False)
        pbar.update(advance)


def load_member(args, path):
    """Return a VAE_Model with the weights of a further checkpoint. UserError for other frame shapes."""
    loaded = read_checkpoint(path)
    settings = {**build_parser().accept(loaded.get("args"), path), **sizes(loaded)}
    for name in ("frame_H", "frame_W"):
        if settings.get(name, getattr(args, name)) != getattr(args, name):
            raise UserError(f"--ckpt_path {path}: its --{name} is {settings[name]}; expected "
                            f"{getattr(args, name)}, as the first checkpoint has")
    names = settings.keys() & {"F_dim", "L_dim", "N_dim", "D_out_dim", "output"}
    own = {name: settings[name] for name in names}
    member = VAE_Model(argparse.Namespace(**{**vars(args), **own}))
    load_weights(member, loaded["state_dict"], path)
    return member


# ---------------------------------------------------------------- the command line

def build_parser():
    """Return the parser of Trainer.py."""
    description = "Train the pose-conditioned VAE, or validate a checkpoint with --test."
    parser = options.build_parser("Trainer.py", description)
    parser.add_argument("--store_visualization", action="store_true",
                        help="keep a GIF and a PSNR plot of every epoch's validation")
    return parser


def main(argv=None):
    """Run the command of an argument list; of sys.argv where there is none."""
    began = time.monotonic()
    check_torch()
    args = build_parser().parse_args(argv)
    command = cli.command_line(__file__, argv)
    options.require(args, "save_root")
    check_save_root(args.save_root)
    last = Path(args.save_root) / "last.ckpt"
    if args.resume and last.exists():
        args.ckpt_path = str(last)
    if args.test:
        options.require(args, "ckpt_path")
    elif len(options.as_list(args.ckpt_path)) > 1:
        raise UserError(f"--ckpt_path {shlex.join(args.ckpt_path)}: expected one checkpoint to train "
                        f"from; several are for --test")
    if args.ckpt_path:
        adopt_settings(args, build_parser())
    options.require(args, "DR")
    distributed.start(args, command)
    model = VAE_Model(args)
    model.session.began, model.session.command = began, command
    model.load_checkpoint()
    if args.resume and not last.exists():
        say(f"--resume: there is no {last}, so this starts from " + (args.ckpt_path or "scratch"))
    if args.test:
        if distributed.rank() == 0:
            logger.write_test(model)
    elif model.current_epoch >= session.epochs_to_train(model):
        say(f"{args.ckpt_path}: all {model.current_epoch} epochs are done; "
            f"a larger --num_epoch trains on")
        session.catch_up_alone(model)
    else:
        model.training_stage()


if __name__ == "__main__":
    cli.run(main, distributed.leave)
