"""Run what surrounds training steps: lock, signals, ranks, time, resuming.

The functions take a VAE_Model.
"""

import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from utils import cli, distributed, figures, graphs, logger, time_budget
from utils.averaging import begin_average
from utils.checkpoint import file_version, is_latest_in, is_resumable, read_checkpoint
from utils.cli import Stopped, UserError, say
from utils.compiling import compile_networks
from utils.files import (
    ROLLOUT_FILES, copy_file, csv_length, locked, set_aside, sweep_leftovers)
from utils.hardware import enough_memory, keep_precision, step_if_finite
from utils.schedules import set_learning_rate, share_done
from utils.training_state import capture, restore, restore_checkpoint

MAX_SKIPPED = 20  # non-finite steps in a row that end training
# flags whose change makes validations that do not compare with earlier ones
OF_A_VALIDATION = "val_vi_len", "frame_H", "frame_W", "z", "rollouts"


@dataclass
class Session:
    """Hold what a model has beside weights and TrainingState, and what ends with the process."""

    command: list = field(default_factory=list)   # words that started this run
    began: float | None = None                    # time.monotonic() when the run started
    behind: bool = False                          # whether `catch_up` is at work
    stop: distributed.StopSignal = field(default_factory=distributed.StopSignal)
    budget: time_budget.TimeBudget | None = None  # of --max_minutes
    total_steps: int | None = None                # of the whole run; None outside a training stage
    step_offset: int = 0                          # see count_steps
    drawn: dict = field(default_factory=dict)     # numbers of the step's teacher forcing samples
    frames: dict = field(default_factory=dict)    # decoded splits
    clips: list | None = None                     # start indices of the training data's clips
    poses: torch.Tensor | None = None             # training poses for BatchNorm recalibration
    ensemble: list = field(default_factory=list)  # further models, for the mean of predictions
    steps_before: int = 0                         # steps done before this training stage
    warm: float = 0.0                             # time.monotonic() after its first few steps
    saved: dict | None = None                     # a checkpoint's state, until training resumes
    version: tuple | None = None                  # `file_version` of that checkpoint
    share: float | None = None                    # done of the run that is resumed
    lr: float | None = None                       # --lr of the command
    evaluates: bool = False                       # in evaluation mode until the next training step
    logits_said: bool = False                     # whether `warn_of_logits` has printed its line
    parallel: object = None                       # DistributedDataParallel around the model
    take_step: object = step_if_finite            # on a GPU a graph of it
    board: object = None                          # TensorBoard's writer
    bar: object = None                            # the progress bar of a rollout

    def count_drawn(self, samples, more):
        """Count a step's teacher forcing samples, bool (n,). more: add them to earlier counts."""
        before = self.drawn if more else {"forced": 0, "drawn": 0}
        self.drawn = {"forced": before["forced"] + int(samples.sum()),
                      "drawn": before["drawn"] + len(samples)}


# ---------------------------------------------------------------- around a training stage

@contextmanager
def guarded(model):
    """Lock save_root inside; save and stop on a signal; raise UserError where memory is short."""
    args, session = model.args, model.session
    memory = enough_memory(f"--batch_size {args.batch_size}",
                           "a smaller one, or --checkpoint_steps for long windows")
    lock = locked(args.save_root) if distributed.rank() == 0 else nullcontext()
    with memory, lock, cli.catching_signals(session.stop.note):
        try:
            yield
        except Stopped:
            if not session.behind:  # else the next resume finds by history.csv what is missing
                model.write(["last.ckpt"])
                logger.write_tables(model)
            command = distributed.resume_command(session.command)
            say(f"stopped in epoch {model.current_epoch}, saved; resume "
                + (f"with: {command}" if session.command else f"from {args.save_root}/last.ckpt"))
            raise
        finally:
            session.parallel = None  # it refers to the process group, whose end must come first
            graphs.forget(model)
            session.budget = session.total_steps = session.share = None
            session.began = None     # another stage in this process has minutes of its own


def prepare(model, kind):
    """Prepare the first step: restore a checkpoint, start ranks, compile, fit --max_minutes.

    kind: the class VAE_Model. UserError where another run has overwritten the checkpoint.
    """
    args, state, session = model.args, model.state, model.session
    # between reading the checkpoint and locking the folder, decoding may have taken minutes
    if session.saved and resumes_in_place(args):
        if file_version(args.ckpt_path) != session.version:
            raise UserError(f"{args.ckpt_path}: another run has written it meanwhile; "
                            f"expected the same command once more")
    # resumed from an earlier checkpoint, the run's best one must not be lost
    latest = session.saved and is_latest_in(args.save_root, args.ckpt_path)
    resumes_here = state.steps_done or latest
    state.num_epoch = args.num_epoch  # a script may have changed it; `resume` sets that of a run
    count_steps(model)
    set_learning_rate(model)
    parallelize(model)
    if session.saved:
        resume(model)
    elif not state.steps_done:  # a script may have called training_one_step
        state.epoch_means, state.step_means = logger.RunningMeans(), logger.RunningMeans()
    model.teacher_forcing_ratio_update()  # by this command's flags, not the checkpoint's
    if distributed.rank() == 0:
        sweep_leftovers(args.save_root)
        aside = None if resumes_here else keep_earlier(model)
        if state.history:
            bring_best(model, aside)
        if args.tensorboard:
            session.board = figures.open_tensorboard(Path(args.save_root) / "tensorboard")
        if resumes_here and state.step == 0:
            catch_up(model)
    state.best_psnr = distributed.broadcast(state.best_psnr, model.device)
    args.lr = model.scheduler.base_lrs[0]  # of a third-party checkpoint it was the last epoch's
    logger.print_start(model)
    if args.compile:
        compile_networks(model, rollouts=not graphs.can_record_step(model, kind))
    graphs.record_step(model, kind)
    session.steps_before = state.steps_done
    if args.max_minutes and model.current_epoch < state.num_epoch:
        time_budget.fit(model)
    set_learning_rate(model)  # a resume restored the checkpoint's


def end_step(model, loss, bar, last):
    """Log a step, save every --save_every_steps, and stop after a signal.

    last: whether the step is the epoch's last. UserError where the loss stays non-finite.
    """
    args, state, session = model.args, model.state, model.session
    before, state.share_done = state.share_done, share_done(model)
    logger.log_steps(model, before)
    logger.print_duration(model)
    # reading from a GPU waits for it: rarely, and at an epoch's end, or validation would do so
    look = model.device.type == "cpu" or state.steps_done % 20 == 0 or last
    if look:
        model.tqdm_bar("train", bar, loss, model.optim.param_groups[0]["lr"], state.step - bar.n)
        if state.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(f"--lr {args.lr:g}, --kl_weight {args.kl_weight:g}: the loss or its "
                            f"gradient was not finite for {int(state.skipped_in_a_row)} steps in a "
                            f"row in epoch {state.epoch}; expected smaller values (the files in "
                            f"{args.save_root} are complete)")
    if look or distributed.world() == 1:
        agree(model)
    if args.save_every_steps and state.step % args.save_every_steps == 0:
        model.write(["last.ckpt"])
    session.stop.check()


def evaluate_until_trained(model):
    """Leave training mode until the next training step, where VAE_Model.__init__ never ran.

    Such a subclass, like the template's Tester, never leaves training mode itself. In training mode
    BatchNorm would normalize each pose alone.
    """
    if not model.initialized:
        nn.Module.train(model, False)
        model.session.evaluates = True


def train_again(model):
    """Return to training mode after `evaluate_until_trained`."""
    if model.session.evaluates:
        nn.Module.train(model, True)
        model.session.evaluates = False


def agree(model):
    """Give all ranks the same clock, and tell them of a signal that any rank received."""
    budget = model.session.budget
    if budget:
        budget.now = distributed.broadcast(time.monotonic(), model.device)
        budget.keep_up(model)
    model.session.stop.agree(model.device)


def count_steps(model):
    """Count the steps of the whole run, which set the schedules.

    Epochs before this one count as they would with this command's batch, ranks and data, whatever
    steps they had: `step_offset` is the difference.
    """
    state, session = model.state, model.session
    steps = [model.steps_in(epoch) for epoch in range(state.num_epoch)]
    session.total_steps = max(1, sum(steps))
    session.step_offset = sum(steps[:state.epoch]) + state.step - state.steps_done


# ---------------------------------------------------------------- resuming

def resumes_in_place(args):
    """Return whether --ckpt_path is in --save_root itself."""
    return Path(args.ckpt_path).resolve().parent == Path(args.save_root).resolve()


def epochs_to_train(model):
    """Return the number of epochs of the run.

    Where --max_minutes left a run fewer epochs and --num_epoch is the same, a resume keeps them.
    """
    saved = model.session.saved
    same = saved and saved["num_epoch"] == model.args.num_epoch
    return saved["state"]["num_epoch"] if same else model.args.num_epoch


def resume(model):
    """Restore the training state of the checkpoint that was loaded."""
    args, state, session, saved = model.args, model.state, model.session, model.session.saved
    if len(saved["ranks"]) != distributed.world():
        say(f"{distributed.world()} process(es), the checkpoint's run had {len(saved['ranks'])}: "
            f"the resumed run is not bitwise identical to an uninterrupted one")
    num_epoch, train_frames = epochs_to_train(model), state.train_frames
    # time, not steps, may have set the share of a run with the same epochs
    session.share = saved["state"]["share_done"] if saved["num_epoch"] == args.num_epoch else None
    keep_precision(model, saved)
    restore_checkpoint(model, saved, args.ckpt_path)
    changed = [f"--{name} {value}" for name, value in vars(args).items() if name in OF_A_VALIDATION
               and saved["settings"].get(name, value) != value]
    if changed and state.history:
        say(f"{', '.join(changed)}: PSNR does not compare with that of earlier epochs, so "
            f"best.ckpt is the best epoch from here on")
        state.best_psnr = -math.inf
    if saved["optimizer"]["state"] and not model.optim.state:
        say(f"--optim {args.optim}: starts without state; the checkpoint has another optimizer's")
    if state.train_frames != train_frames:
        say(f"--DR {args.DR}: {train_frames} training frames, "
            f"the checkpoint's run had {state.train_frames}")
    state.num_epoch, state.train_frames, session.saved = num_epoch, train_frames, None
    model.scheduler.base_lrs = [session.lr]
    steps, before = model.steps_in(state.epoch), saved.get("epoch_steps")
    if before not in (None, steps):  # the epoch resumes at the same share of its data
        say(f"{steps} steps an epoch, the checkpoint's run had {before}")
        state.step = round(state.step * steps / before)
    count_steps(model)


def keep_earlier(model):
    """Move an earlier run's files out of save_root. Returns the folder that has them, or None."""
    root = Path(model.args.save_root)
    # copied by this command, which was killed before its first last.ckpt
    copied = not (root / "last.ckpt").exists() and model.state.best_psnr == validated_psnr(
        root / "best.ckpt")
    aside = None if copied else set_aside(root)
    if aside:
        say(f"--save_root {root}: an earlier run's files are moved to {aside}"
            + (f"; --save_root {aside} --resume resumes their run"
               if is_resumable(aside / "last.ckpt") else ""))
    return aside


def bring_best(model, aside):
    """Copy the best epoch's checkpoint and figures into save_root if a run resumes elsewhere.

    aside: the folder to which files of save_root were moved, or None. Where no checkpoint of that
    epoch is found, best.ckpt is the best epoch from here on: one line.
    """
    args, state, root = model.args, model.state, Path(model.args.save_root)
    if (root / "best.ckpt").exists() or state.best_psnr == -math.inf:
        return
    given = Path(args.ckpt_path or root / "last.ckpt")
    folders = [folder for folder in (aside, given.parent) if folder]
    paths = [folder / name for name in ("best.ckpt", given.name) for folder in folders]
    best = next((path for path in paths if validated_psnr(path) == state.best_psnr), None)
    if best is None:
        say(f"--save_root {root}: no best.ckpt of the resumed run's best epoch "
            f"({state.best_psnr:.2f} dB) in {' or '.join(map(str, folders))}; "
            f"best.ckpt is the best epoch from here on")
        state.best_psnr = -math.inf
        return
    for name in ROLLOUT_FILES if best.name == "best.ckpt" else ():  # else another epoch's
        if (best.parent / name).exists():
            copy_file(best.parent / name, root / name)
    copy_file(best, root / "best.ckpt")


def validated_psnr(path):
    """Return the PSNR of the epoch at whose end a checkpoint of ours was written, else None."""
    try:
        state = read_checkpoint(path)["resume"]["state"]
        return None if state["step"] else state["history"][-1]["val_psnr_mean"]
    except (UserError, KeyError, TypeError, IndexError):  # missing, damaged or third-party
        return None


def catch_up(model):
    """Write what the newest epoch lacks if a kill or a full disk came after its last.ckpt."""
    args, state, root = model.args, model.state, Path(model.args.save_root)
    if distributed.rank() or not state.history:
        return
    if csv_length(root / "history.csv") == len(state.history):
        return
    model.session.behind, epoch = True, state.history[-1]["epoch"]
    last, named = root / "last.ckpt", root / f"epoch={epoch}.ckpt"
    if epoch % args.per_save == 0 and last.exists() and not named.exists():
        copy_file(last, named)
    best = root / "best.ckpt"
    best = best.exists() and read_checkpoint(best)["last_epoch"] == epoch
    if best or getattr(args, "store_visualization", False):
        model.eval()
    logger.write_epoch(model, best)
    model.session.behind = False


def catch_up_alone(model, open_data):
    """Open the data and restore the state of a run that is done, for `catch_up`.

    open_data: called with the model.
    """
    saved, args = model.session.saved, model.args
    if not saved or not args.resume or distributed.rank() or not resumes_in_place(args):
        return
    with locked(args.save_root), cli.catching_signals(cli.stop):
        sweep_leftovers(args.save_root)
        if csv_length(Path(args.save_root) / "history.csv") != len(saved["state"]["history"]):
            open_data(model)
            begin_average(model)
            restore_checkpoint(model, saved, args.ckpt_path)
            catch_up(model)
        logger.enlarge(model)  # the kill may have come before a run's last file


# ---------------------------------------------------------------- ranks

def parallelize(model):
    """Have training steps average their gradients over the ranks; take rank 0's weights."""
    if distributed.world() == 1:
        return
    args, session = model.args, model.session
    session.parallel = DistributedDataParallel(model)
    # the order of DDP's sums changes after one step: discard it, for a bitwise identical resume
    saved = capture(model)
    window = torch.zeros(args.batch_size, 2, 3, args.frame_H, args.frame_W, device=model.device)
    session.parallel(window, window, True)[0].backward()
    model.optim.zero_grad(set_to_none=True)
    restore(model, saved)
    torch.manual_seed(args.seed + distributed.rank())  # every rank draws its own noise


def validate(model):
    """Run `model.eval()` on rank 0, and return its PSNR in dB on every rank.

    An error on rank 0 ends every rank.
    """
    began = time.monotonic()
    psnr, problem = 0.0, None
    if distributed.world() == 1:
        psnr = model.eval()
    else:
        # BatchNorm saw other windows on each rank: take rank 0's statistics
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        if distributed.rank() == 0:
            try:
                psnr = model.eval()
            except (Stopped, UserError) as error:
                problem = error
        if distributed.broadcast(isinstance(problem, UserError), model.device):
            raise problem or SystemExit(2)  # rank 0 alone prints the error
        model.session.stop.agree(model.device)
        model.session.stop.check()
        psnr = distributed.broadcast(psnr, model.device)
    if model.session.budget:
        seconds = distributed.broadcast(time.monotonic() - began, model.device)
        model.session.budget.reserve(seconds)
        model.session.budget.validated += seconds
    return psnr
