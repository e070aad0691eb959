"""Train the pose-conditioned VAE of the lab: one image and 630 poses in, 629 frames out.

    python Trainer.py --DR data --save_root ckpt --fast_train            # the recommended command
    python Trainer.py --DR data --save_root out --ckpt_path ckpt/best.ckpt --test        # validate

Reads top to bottom as the algorithm. Where to look, in `VAE_Model`:

    the loss                loss_terms, called by forward; by default log_mse + beta * 1e-4 * kl
    the previous frame      forward; its frame 0: RolloutPool.draw in dataloader.py; rollout_block
    an epoch                training_stage -> train_epoch, eval, end_epoch
    beta, teacher forcing   beta and sample_teacher_forcing; their curves in utils/schedules.py
    the optimizer           optim; its flag, and the default of each recipe, in utils/options.py
    a checkpoint            checkpoint; its "resume": capture in utils/training_state.py
    validation PSNR         eval -> val_one_step: the mean of Generate_PSNR over 629 frames

The rollout pool of the default recipe is in dataloader.py; what is not about this method (flags,
files, hardware, ranks, logs) is in utils/.
"""

import math
import time
from functools import cached_property, partial
from pathlib import Path

from utils import cli  # before PyTorch: see utils/__init__.py
from utils.cli import plural, say

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import dataloader
from dataloader import Dataset_Dance, frame_transform  # noqa: F401 (template scripts import them)
from modules import Decoder_Fusion, Gaussian_Predictor, Generator, Label_Encoder, RGB_Encoder
from utils import distributed, figures, logger, options, session
from utils.averaging import begin_average, network_state, update_average, validated_weights
from utils.checkpoint import (
    adopt_settings, file_version, load_weights, read_checkpoint, write_checkpoint)
from utils.files import check_save_root, make_folder
from utils.graphs import replayed_frame
from utils.hardware import (
    Float32Conv2d, autocast, channels_last, check_torch, enough_memory, evaluating, in_pieces,
    join, pick_device, pick_precision, without_gradients)
from utils.metrics import check_finite, psnr, warn_of_logits
from utils.muon import Muon
from utils.schedules import (
    beta_at, data_share, in_continuous_stage, kl_annealing, next_learning_rate_factor,
    schedule_epoch, share_done, teacher_forcing_ratio)
from utils.training_state import TrainingState, capture, load_member, take_settings

CLIP_NORM = 1.0     # gradient norm, the template's
ROLLOUT_BLOCK = 32  # frames between two looks at a rollout: bar, signals, non-finite values
NOISE_MSE = 1e-5    # 50 dB: errors below it hardly count
GIF_TICK = 40       # milliseconds a frame, the template's
OUTPUTS = {"none": lambda x: x, "clamp": lambda x: x.clamp(0, 1), "sigmoid": torch.sigmoid}


# ---------------------------------------------------------------- losses and metric

def Generate_PSNR(imgs1, imgs2, data_range=1.):
    """Return the PSNR in dB, at most 100, over tensors of one shape in [0, data_range]."""
    return psnr(F.mse_loss(imgs1, imgs2) / data_range ** 2)


def kl_criterion(mu, logvar, batch_size):
    """Return KL(q || N(0, I)) summed over latent elements, averaged over the batch, in nats.

    mu, logvar: (B, N_dim, H, W). Kingma & Welling 2014, appendix B.
    """
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / batch_size


def log_mse(frames, truth):
    """Return 0.001 * log(1 + MSE / 1e-5), a mean over frames: decibels from 20 to 40 count alike.

    frames, truth: (B, 3, H, W) in [0, 1]. The gradient is the MSE's at 30 dB, and larger at smaller
    errors. Rybkin et al. 2021, the optimal sigma of a calibrated decoder.
    """
    mse = (frames - truth).square().mean((1, 2, 3))
    return 1e-3 * torch.log1p(mse / NOISE_MSE).mean()


# ---------------------------------------------------------------- the model

class VAE_Model(nn.Module):
    """Own the conditional VAE: its training step, rollout, training stage and checkpoints.

    args: a Namespace of `build_parser()`, or any other: a flag it lacks has the parser's default,
    and without `recipe` it trains the template's way. `state` is what a resume needs, `session`
    what ends with the process. They and the optimizer are made on first use: a subclass may build
    the five networks itself and never run this __init__, as the template's Tester does.
    UserError for a device that is missing and for values out of range.
    """

    initialized = False  # whether __init__ ran

    def __init__(self, args):
        super().__init__()
        self.initialized, self.args = True, args
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
        for name in ("batch_size", "tfr_sde", "tfr_d_step", "train_vi_len", "val_vi_len"):
            setattr(self, name, getattr(args, name))

    @property
    def args(self):
        """Return the flags, complete."""
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
        """Return the TrainingState; third-party classes may set current_epoch before args."""
        args = self.__dict__.get("_args") or build_parser().parse_args([])
        sampler = torch.Generator().manual_seed(args.seed)
        return TrainingState(num_epoch=args.num_epoch, sampler=sampler)

    @cached_property
    def session(self):
        """Return the Session."""
        return session.Session()

    @cached_property
    def kl_annealing(self):
        """Return the schedule of beta by whole epochs."""
        return kl_annealing(self.args, self.current_epoch)

    @cached_property
    def tfr(self):
        """Return the probability of teacher forcing in the next step."""
        return teacher_forcing_ratio(self.args, schedule_epoch(self))

    @cached_property
    def optim(self):
        """Return the optimizer. On a GPU it must skip a non-finite step: fused, or as Muon does."""
        kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "Muon": Muon}[self.args.optim]
        fused = self.device.type in ("cuda", "cpu")
        return kind(self.parameters(), lr=self.args.lr, fused=fused)

    @cached_property
    def scheduler(self):
        """Return the schedule of the learning rate."""
        factor = partial(next_learning_rate_factor, self)
        return torch.optim.lr_scheduler.LambdaLR(self.optim, factor)

    @cached_property
    def scaler(self):
        """Return the scale of the loss in fp16; without effect in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @cached_property
    def picked_precision(self):
        """Return (fp32, bf16 or fp16, why): --precision, or the fastest on this machine."""
        return distributed.broadcast_object(pick_precision(self.args.precision, self.device))

    @property
    def precision(self):
        """Return fp32, bf16 or fp16."""
        return self.picked_precision[0]

    @property
    def current_epoch(self):
        """Return the epoch that is trained."""
        return self.state.epoch

    @current_epoch.setter
    def current_epoch(self, epoch):
        self.state.epoch = epoch

    @property
    def device(self):
        """Return the device of the networks."""
        return next(self.frame_transformation.parameters()).device

    def load_state_dict(self, *args, **kwargs):
        """Load weights as every module does, and see utils/session.py."""
        incompatible = super().load_state_dict(*args, **kwargs)
        session.evaluate_until_trained(self)
        return incompatible

    # --------------------------------------- a training step: the assignment's figure 2 (a)

    def forward(self, img, label, adapt_TeacherForcing=False):
        """Predict frames 1 to T - 1 of a batch of windows, frame t from frame t - 1.

        img, label: (B, T, 3, H, W) in [0, 1]; frame 0 is true or, in the pool recipe (T = 2), a
        rollout's. adapt_TeacherForcing: a bool, or bool (T,): whether frame t is predicted from
        frame t - 1 of img (t = 1 always is), else from the generated one. Returns (loss, mse, kl,
        frame T - 1 generated (B, 3, H, W)), means over frames; `losses` holds every term by name.
        """
        batch, length = img.shape[:2]
        teacher_forced = torch.as_tensor(adapt_TeacherForcing).expand(length).tolist()
        # (B, T, 3, H, W) -> (T * B, 3, H, W): with time in the batch, tensors stay channels-last
        img, label = (channels_last(x.transpose(0, 1).flatten(0, 1)) for x in (img, label))
        apply = partial(in_pieces, step=batch if self.args.checkpoint_steps else None)

        # encode all poses and frames, and infer the posterior of frames 1 to T - 1
        pose = self.label_transformation(label[batch:])               # L_dim channels
        feature = apply(self.frame_transformation, img).split(batch)  # F_dim channels, by t
        z, mu, logvar = apply(self.Gaussian_Predictor, join(feature[1:]), pose)
        pose, z = (dict(enumerate(x.split(batch), 1)) for x in (pose, z))  # by t

        # predict from given frames (of img), all at once, and then from generated frames, in order
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

        frames, truth: (N, 3, H, W); mu, logvar: (N, N_dim, H, W). To log a further term x, add it
        to `loss` and the dict here, and "x" to STEPS and "train_x" to HISTORY in utils/files.py.
        """
        mse = getattr(self, "mse_criterion", F.mse_loss)(frames, truth)
        kl = kl_criterion(mu, logvar, len(mu))
        reconstruction = log_mse(frames, truth) if self.args.objective == "log_mse" else mse
        loss = reconstruction + self.beta() * self.args.kl_weight * kl
        return {"loss": loss, "reconstruction": reconstruction, "mse": mse, "kl": kl}

    def next_frame(self, previous, pose, z):
        """Return the frame that follows `previous` (B, 3, H, W); a graph on a GPU."""
        return self.decode(self.frame_transformation(previous), pose, z)

    def decode(self, previous, pose, z):
        """Return frames (B, 3, H, W) from features of the previous frame and the pose, and z."""
        z = z.to(previous.dtype)  # a float32 input would make the concatenation float32
        return OUTPUTS[self.args.output](self.Generator(self.Decoder_Fusion(previous, pose, z)))

    def training_one_step(self, img, label, adapt_TeacherForcing):
        """Take one optimizer step on a batch, as of `forward`, and log it. Returns the loss, ()."""
        session.train_again(self)
        self.optim.zero_grad(set_to_none=True)
        statistics = [buffer.clone() for buffer in self.buffers()]  # BatchNorm's
        img, label = (x.to(self.device, non_blocking=True) for x in (img, label))
        with autocast(self.device, self.precision, cache=self.args.train_vi_len > 2):
            # not self(...): a subclass in the template's way overrides forward
            forward = self.session.parallel or partial(VAE_Model.forward, self)
            loss, _, _, self.generated = forward(img, label, adapt_TeacherForcing)
        # a non-finite loss gets a NaN gradient, so that the step is skipped; as gradients are
        # averaged over ranks, all of them skip it
        valid = torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss)
        self.scaler.scale(loss).backward(valid)
        finite = self.optimizer_step()
        self.losses = {name: term.detach() for name, term in self.losses.items()}  # without graph
        with torch.no_grad():
            for buffer, before in zip(self.buffers(), statistics):
                buffer.copy_(torch.where(finite, buffer, before))
        self.generated = self.generated.detach()
        logger.add_step(self, finite)
        return loss.detach()

    def optimizer_step(self):
        """Clip the gradient, step, average weights. Returns whether the gradient is finite, ()."""
        finite = self.session.take_step(self.optim, self.scaler, self.parameters(), CLIP_NORM)
        update_average(self)
        return finite

    # --------------------------------------- the rollout: the assignment's figure 2 (b)

    def rollout(self, first, label, on_block=None):
        """Generate sequences from their first frames and poses; validation and testing share it.

        first: (S, 3, H, W), label: (S, T, 3, H, W), float32 in [0, 1]. Returns (S, T - 1, 3, H, W)
        in [0, 1], on the CPU. z is drawn from N(0, I) at every step, for each sequence from its own
        generator. The frame fed back is the one returned, clamped; with several checkpoints it is
        the mean of their predictions. With --rollouts N each of N feeds back its own, and their
        mean is returned. on_block(t, frames) is called every few frames with those made since, t
        of them so far. UserError names sequence and frame of a non-finite prediction.
        """
        args, device, models = self.args, self.device, [self, *self.session.ensemble]
        count, length = label.shape[:2]
        noise = [torch.Generator(device).manual_seed(args.seed + i)
                 for _ in range(count) for i in range(args.rollouts)]
        previous, blocks = first.to(device).repeat_interleave(args.rollouts, 0), []
        size = f"{count} sequence(s) of {label.shape[-1]}x{label.shape[-2]}"
        memory = enough_memory(f"--rollouts {args.rollouts}, {size}", "fewer, or --device cpu")
        predict = [replayed_frame(model, VAE_Model) for model in models]
        with memory, evaluating(*models), without_gradients(device, self.precision):
            for start in range(1, length, ROLLOUT_BLOCK):
                poses = label[:, start:start + ROLLOUT_BLOCK]
                frames, finite = self.rollout_block(models, predict, previous, poses, noise)
                check_finite(finite, start, args.rollouts)
                previous = frames[-1]
                frames = frames.transpose(0, 1).unflatten(0, (count, args.rollouts)).mean(1)
                blocks.append(frames.cpu())  # (S, t, 3, H, W)
                if on_block:
                    on_block(start + frames.shape[1] - 1, blocks[-1])
        return torch.cat(blocks, 1)

    def rollout_block(self, models, predict, previous, label, noise):
        """Generate the frames after `previous` (N, 3, H, W), along poses (S, t, 3, H, W).

        predict: `next_frame` of each model. noise: a generator for each of the N rollouts.
        Returns frames (t, N, 3, H, W) in [0, 1], and whether each was finite, bool (t, N).
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
                next_frame(channels_last(previous), channels_last(pose[t]),
                           channels_last(z[t, :, :model.args.N_dim])).float()
                for model, next_frame, pose in zip(models, predict, poses)]
            given = previous
            previous = predicted[0] if len(models) == 1 else torch.stack(predicted).mean(0)
            if predict[0].calls == 1:  # the rollout's first frame
                warn_of_logits(self, previous, given)
            finite.append(previous.isfinite().flatten(1).all(1))
            previous = previous.clamp(0, 1)
            frames.append(previous)
        return torch.stack(frames), torch.stack(finite).cpu()

    def val_one_step(self, img, label):
        """Roll out a batch of sequences, img and label (B, T, 3, H, W).

        Returns (loss, T - 1 PSNRs in dB), means over the batch.
        """
        psnrs, truth = [], img[:, 1:].cpu()

        def score(done, frames):  # those made since the last call, (B, t, 3, H, W)
            pairs = zip(frames.unbind(1), truth[:, done - frames.shape[1]:done].unbind(1))
            psnrs.extend(torch.stack([*map(Generate_PSNR, *pair)]).mean() for pair in pairs)
            so_far = torch.stack(psnrs).mean()
            self.tqdm_bar("val", self.session.bar, so_far, advance=frames.shape[1])
            self.session.stop.check(alone=True)

        self.predicted = self.rollout(img[:, 0], label, score)  # (B, T - 1, 3, H, W), for figures
        return F.mse_loss(self.predicted, truth), torch.stack(psnrs).tolist()

    def eval(self):
        """Roll out the validation data. Returns the mean PSNR over frames in dB; makes save_root.

        Hides nn.Module.eval(), as in the template: `nn.Module.train(model, flag)` switches modes.
        """
        losses, psnrs, loader = [], [], self.val_dataloader()
        if self.args.save_root is not None:
            make_folder(self.args.save_root)
        with validated_weights(self), logger.rollout_bar(self, len(loader)) as self.session.bar:
            for img, label in loader:
                loss, psnr_per_frame = self.val_one_step(img, label)
                losses.append(loss)
                psnrs.append(psnr_per_frame)
        self.session.bar = None
        self.val_loss = float(torch.stack(losses).mean())
        self.psnr_per_frame = np.mean(psnrs, axis=0).tolist()
        self.val_sequence = label[0, 1:].cpu(), self.predicted[0], img[0, 1:].cpu()
        return float(np.mean(self.psnr_per_frame))

    # ------------------------------------------------------------ data

    def dataset(self, mode, video_len, partial=1.0):
        """Return the Dataset_Dance of a split, whose frames are decoded once unless --no_cache."""
        decoded = self.session.frames
        return dataloader.open_split(self.args, mode, video_len, partial, decoded, self.device)

    def train_dataloader(self, skip=0):
        """Return batches of this epoch's windows, this rank's share, from batch `skip` on."""
        args, rank, world = self.args, distributed.rank(), distributed.world()
        dataset = self.dataset("train", args.train_vi_len, data_share(args, self.current_epoch))
        order = range(rank, len(dataset) - len(dataset) % world, world)[skip * args.batch_size:]
        return dataloader.window_loader(dataset, args.batch_size, args.num_workers, order)

    def val_dataloader(self):
        """Return the validation sequences of val_vi_len frames, one a batch."""
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
            forced = self.sample_teacher_forcing(args.train_vi_len)
            restarted = self.sample_teacher_forcing(args.batch_size, of_rollouts=True)
            window = pool.draw(args.batch_size, args.train_vi_len, args.next_share, restarted)
            yield *window, forced

    def sample_teacher_forcing(self, count, of_rollouts=False):
        """Draw `count` bools, True with probability `tfr`: one draw an epoch, a batch, or each.

        of_rollouts: a sample restarts a rollout of the pool; else it forces a frame of a window,
        whose entries 0 and 1 are not counted: frame 1 is always predicted from the given frame 0.
        """
        self.teacher_forcing_ratio_update()
        state, interval = self.state, self.args.tf_coin
        if state.epoch_sample is None:
            state.epoch_sample = float(torch.rand(1, generator=state.sampler))
        if interval == "epoch":
            uniform = torch.full((count,), state.epoch_sample)
        else:
            size = count if interval == "frame" else 1
            uniform = torch.rand(size, generator=state.sampler).expand(count)
        teacher_forced = uniform < self.tfr
        counted = teacher_forced if of_rollouts else teacher_forced[2:]
        self.session.count_drawn(counted, more=of_rollouts)
        return teacher_forced

    def steps_in(self, epoch):
        """Return the training steps of an epoch on this rank."""
        args, world = self.args, distributed.world()
        frames = int(self.state.train_frames * data_share(args, epoch))
        if not args.pool:
            return frames // args.train_vi_len // world // args.batch_size
        return max(1, frames // (args.batch_size * (args.train_vi_len - 1) * world))

    def beta(self):
        """Return beta in [0, 1] of the next step by --kl_anneal_type, of `beta_at`.

        Cyclical (default, 10 cycles, ratio 1): min(1, (cycles * e / num_epoch % 1) / ratio).
        Monotonic: one cycle. None: 1. e: the epoch; in the pool recipe share done * num_epoch.
        """
        if in_continuous_stage(self):
            return beta_at(self.kl_annealing.args, schedule_epoch(self))
        return self.kl_annealing.get_beta()

    def teacher_forcing_ratio_update(self):
        """Set tfr of the next step: max(tfr_min, tfr - tfr_d_step * max(0, e - tfr_sde + 1))."""
        self.tfr = teacher_forcing_ratio(self.args, schedule_epoch(self))

    # ------------------------------------------------------------ the training stage

    def training_stage(self):
        """Train from the current epoch to the last; after each, validate, record and save.

        A signal of cli.INTERRUPTED saves last.ckpt and raises Stopped. UserError for data that
        can't be used, a save_root that another run holds, and losses that stay non-finite.
        """
        self.session.began = self.session.began or time.monotonic()
        if self.args.tensorboard:  # without the package no minutes are spent on decoding
            figures.tensorboard_writer()
        with cli.catching_signals(cli.stop):
            dataloader.open_training_data(self)
        make_folder(self.args.save_root)
        begin_average(self)
        with session.guarded(self):
            session.prepare(self, VAE_Model)
            while self.current_epoch < self.state.num_epoch:
                self.train_epoch()
                psnr_mean = session.validate(self)  # eval, on rank 0
                self.end_epoch(psnr_mean)
            logger.enlarge(self)
        say(f"done: {plural(self.current_epoch, 'epoch')}, best validation PSNR "
            f"{self.state.best_psnr:.2f} dB, in {self.args.save_root}")

    def train_epoch(self):
        """Do the rest of the epoch's training steps; frames generated in one go into the pool."""
        state, budget = self.state, self.session.budget
        steps, began = self.steps_in(self.current_epoch), time.monotonic() - state.seconds
        repeats = budget and budget.repeats_epoch(state)  # until the time is over
        with logger.epoch_bar(self, None if repeats else steps) as bar:
            while True:
                done = state.step % steps if repeats else state.step
                for img, label, teacher_forced in self.batches(done):
                    loss = self.training_one_step(img, label, teacher_forced)
                    if state.pool is not None:
                        state.pool.put(self.generated)
                    state.step, state.steps_done = state.step + 1, state.steps_done + 1
                    self.scheduler.step()
                    state.seconds = time.monotonic() - began
                    session.end_step(self, loss, bar, last=state.step % steps == 0)
                    if budget and budget.over():
                        return
                repeats = budget and budget.repeats_epoch(state)  # steps may have become slower
                if not repeats:
                    return

    def end_epoch(self, psnr_mean):
        """Record the epoch that was trained and validated, advance to the next, write the files."""
        args, state, epoch = self.args, self.state, self.current_epoch
        best = psnr_mean > state.best_psnr
        if best:
            state.best_psnr = psnr_mean
        if distributed.rank() == 0:
            state.history.append(logger.epoch_row(self, psnr_mean))
        state.next_epoch()
        self.kl_annealing.update()
        self.teacher_forcing_ratio_update()
        self.scheduler.step()  # sets the rate from the progress, not from the number of calls
        session.agree(self)
        if self.session.budget and self.session.budget.over():
            state.num_epoch = state.epoch
        kept = [f"epoch={epoch}.ckpt"] * (epoch % args.per_save == 0)  # needs more room: at the end
        self.write(["best.ckpt"] * best + ["last.ckpt"] + kept)
        if distributed.rank() == 0:
            logger.write_epoch(self, best)

    # ------------------------------------------------------------ checkpoints

    def checkpoint(self):
        """Return the run, plain types and tensors; `resume`: the rest of `capture`, and flags."""
        with validated_weights(self):
            weights = network_state(self)
        saved, args = capture(self), vars(self.args)
        raw = saved.pop("weights")
        differ = self.state.average is not None or self.session.poses is not None
        plain = type(None), bool, int, float, str
        given = sorted(set(self.args.given) - options.OF_THE_MACHINE)
        return {
            "state_dict": weights,  # those that are validated
            **({"train_state_dict": raw} if differ else {}),
            "optimizer": saved.pop("optimizer"),
            "lr": self.scheduler.base_lrs[0],  # the peak: a cosine's end, 0, is of no use to others
            "tfr": self.tfr,
            "last_epoch": self.current_epoch - 1,
            "args": {name: str(value) if isinstance(value, Path) else value
                     for name, value in args.items() if isinstance(value, (*plain, Path))},
            "resume": {**saved, "num_epoch": self.args.num_epoch, "given": given},
        }

    def write(self, names):
        """Write the checkpoint into save_root under these names; every rank calls this."""
        checkpoint = self.checkpoint()
        if distributed.rank() == 0:
            path, *copies = (Path(self.args.save_root) / name for name in names)
            write_checkpoint(path, checkpoint, copies)

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
        session.evaluate_until_trained(self)
        own.ensemble = [load_member(VAE_Model, args, other) for other in others]
        take_settings(self, loaded)

    # ------------------------------------------------------------ what is shown

    def make_gif(self, images_list, img_name, duration=GIF_TICK):
        """Write frames (3, H, W) in [0, 1] as a GIF, `duration` milliseconds each."""
        figures.write_gif(images_list, img_name, duration)

    def tqdm_bar(self, mode, pbar, loss, lr=0.0, advance=1):
        """Advance a bar ("train" or "val"); show the schedules and the loss (val: PSNR so far)."""
        if pbar is None:
            return
        figure = f"PSNR {loss:.2f} dB" if mode == "val" else f"lr {lr:.1e}, loss {loss:.5f}"
        text = f"run {share_done(self):.0%}, tfr {self.tfr:.2f}, beta {self.beta():.2f}, {figure}"
        pbar.set_postfix_str(text, refresh=False)
        pbar.update(advance)


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
    if args.resume and last.exists() and not (args.test and args.ckpt_path):
        args.ckpt_path = str(last)
    if args.test:
        options.require(args, "ckpt_path")
    else:
        options.require_one_checkpoint(args)
    if args.ckpt_path:
        adopt_settings(args, build_parser())
    options.require(args, "DR")
    distributed.start(args, command)
    model = VAE_Model(args)
    assert model.precision  # all ranks pick it together; rank 0 alone may test
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
        session.catch_up_alone(model, dataloader.open_training_data)
    else:
        model.training_stage()


if __name__ == "__main__":
    cli.run(main, distributed.leave)
