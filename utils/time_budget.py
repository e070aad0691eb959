"""Fit the epochs and schedules of a run to --max_minutes."""

import time

import torch

from utils import graphs
from utils.averaging import validated_weights
from utils.cli import say
from utils.distributed import broadcast
from utils.schedules import share_done
from utils.training_state import capture, restore

FEW_FRAMES = 33  # frames of the rollout that is timed; all of them on CUDA, where it is short
EARLY = 0.1      # share of the time in which a run's pace is not judged
MARGIN = 1.2, 5  # for the last validation: a factor (the machine may slow down), seconds for files


class TimeBudget:
    """Keep the time of a run, in seconds of time.monotonic().

    end: by which the last validation is done. validation: its duration. share: the share of the run
    in [0, 1] that is done at the time `now`, after `steps` steps.
    """

    def __init__(self, end, now, validation, share, steps):
        self.end, self.start_share, self.steps = end, share, steps
        self.start = self.now = now
        self.validated = 0.0  # seconds of validations since `start`
        self.fitted = False   # whether time sets the schedules; else all epochs seem to have time
        self.reserve(validation)

    def reserve(self, validation):
        """Set training's deadline: `end` less the last validation's seconds and a margin."""
        self.validation = validation
        self.deadline = self.end - MARGIN[0] * validation - MARGIN[1]

    def over(self):
        """Return whether the last validation must begin."""
        return self.now >= self.deadline

    def share(self):
        """Return the share of the run in [0, 1] that is done, 1 at the deadline."""
        gone = (self.now - self.start) / max(1e-9, self.deadline - self.start)
        return self.start_share + (1 - self.start_share) * min(1.0, max(0.0, gone))

    def repeats_epoch(self, state):
        """Return whether the epoch is trained until the time is over: the last of a fitted run."""
        return self.fitted and state.epoch == state.num_epoch - 1 and not self.over()

    def keep_up(self, model):
        """Let time set the rest of the schedules where steps became too slow for all epochs."""
        state, gone = model.state, self.now - self.start
        share, done = share_done(model), state.steps_done - self.steps
        if self.fitted or share == 1 or not done or gone < EARLY * (self.deadline - self.start):
            return
        needed = (gone - self.validated) / done * (1 - share) * model.session.total_steps
        needed += self.validation * (state.num_epoch - 1 - state.epoch)
        if needed > self.deadline - self.now:
            self.fitted, self.start, self.start_share = True, self.now, share
            state.by_time = True
            say("--max_minutes: steps have become slower, so time sets the rest of the run")


def fit(model):
    """Time a training step and a rollout; set session.budget and the number of epochs."""
    args, state, session = model.args, model.state, model.session
    saved = capture(model)
    step = broadcast(seconds_a_step(model), model.device)
    restore(model, saved)
    validation = broadcast(seconds_a_validation(model), model.device)
    restore(model, saved)

    now = broadcast(time.monotonic(), model.device)  # one clock for all ranks
    share = share_done(model) if session.share is None else session.share
    end = broadcast(session.began + 60 * args.max_minutes, model.device)
    if share >= 1:  # stopped in the last validation
        end = now
    budget = TimeBudget(end, now, validation, share, state.steps_done)
    left, epoch = budget.deadline - now, state.epoch
    # a run that was fitted stays so: time set its share
    before = state.num_epoch < args.num_epoch or session.share is not None and state.by_time
    while epoch < args.num_epoch:
        left -= model.steps_in(epoch) * step + (validation if epoch > state.epoch else 0)
        if left < 0 and epoch > state.epoch:
            break
        epoch += 1
    budget.fitted = before or epoch < args.num_epoch or left < 0
    state.num_epoch, state.by_time, session.budget = epoch, budget.fitted, budget
    say(f"--max_minutes {args.max_minutes:g}: a step takes {step:.3f} s, a validation about "
        f"{validation:.0f} s; {epoch - state.epoch} epochs")


def seconds_a_step(model):
    """Return the median duration in seconds of a few training steps."""
    seconds, began = [], time.monotonic()
    count = 25 if model in graphs.with_networks else 5  # there the first few are no graphs yet
    for batch, _ in zip(model.batches(), range(count)):
        model.training_one_step(*batch)
        if model.state.pool is not None:
            model.state.pool.put(model.generated)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds.append(time.monotonic() - began)
        began = time.monotonic()
    return sorted(seconds)[len(seconds) // 2]


def seconds_a_validation(model):
    """Return the duration in seconds of a validation, estimated from a short rollout."""
    args, loader = model.args, model.val_dataloader()
    img, label = next(iter(loader))
    few = min(args.val_vi_len, FEW_FRAMES)
    timed = args.val_vi_len if model.device.type == "cuda" else few
    for length in (few, timed):  # the first rollout is a warm-up
        began = time.monotonic()
        with validated_weights(model):
            ready = time.monotonic()
            model.rollout(img[:, 0], label[:, :length])
        rollout = (time.monotonic() - ready) * (args.val_vi_len - 1) / (timed - 1)
    return ready - began + rollout * len(loader)
