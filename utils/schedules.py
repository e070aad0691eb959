"""Schedule teacher forcing, the KL weight, the learning rate and the data. Pure Python.

Epochs count from 0. In the template's recipe `e` is a whole epoch. In the pool recipe `e` is
continuous: the share of the run that is done times num_epoch, so that a run of any length has the
whole curve.
"""

import math

from utils import options
from utils.cli import UserError, say

FAST_LR = 1.1      # factor of --fast_train's learning rate, unless --lr is given
WARM_UP = 0.02     # share of the run in which the cosine schedule climbs: <= 0.1 of the first epoch
MILESTONES = 2, 5  # epochs at which the template's learning rate drops to a tenth


def teacher_forcing_ratio(args, e):
    """Return the probability in [0, 1] of teacher forcing at epoch e."""
    return max(args.tfr_min, args.tfr - args.tfr_d_step * max(0, e - args.tfr_sde + 1))


def frange_cycle_linear(n_iter, start=0.0, stop=1.0, n_cycle=1, ratio=1):
    """Return n_iter values, a list, in n_cycle cycles.

    The first `ratio` of a cycle climbs from start to stop; the rest is stop. Fu et al. 2019,
    Cyclical Annealing Schedule, equations 6 and 7. UserError for cycles below 1 and a ratio outside
    (0, 1].
    """
    if n_cycle < 1 or not 0 < ratio <= 1:
        raise UserError(f"n_cycle {n_cycle}, ratio {ratio}: expected at least 1, and above 0 and "
                        f"at most 1")
    period = n_iter / n_cycle
    starts = [int(c * period) for c in range(math.ceil(n_cycle))] + [n_iter]
    return [start + (stop - start) * min(1.0, i / (period * ratio))
            for first, end in zip(starts, starts[1:]) for i in range(end - first)]


def kl_cycles(args):
    """Return the number of annealing cycles.

    The template's recipe has whole epochs, so a cycle takes at least two.
    """
    cycles = args.kl_anneal_cycle if args.kl_anneal_type == "Cyclical" else 1
    return cycles if continuous(args) else min(cycles, max(1, args.num_epoch // 2))


def beta_of_epoch(args, epoch):
    """Return beta in [0, 1] of a whole epoch; after the last epoch, the last value."""
    if args.kl_anneal_type == "None":
        return 1.0
    betas = frange_cycle_linear(args.num_epoch, 0.0, 1.0, kl_cycles(args), args.kl_anneal_ratio)
    return betas[min(epoch, len(betas) - 1)]


def beta_at(args, e):
    """Return beta in [0, 1], a factor of --kl_weight, at epoch e, in the pool recipe a decimal."""
    if args.kl_anneal_type == "None" or not continuous(args):
        return beta_of_epoch(args, int(e))
    cycle = kl_cycles(args) * e / args.num_epoch
    return 1.0 if e >= args.num_epoch else min(1.0, cycle % 1 / args.kl_anneal_ratio)


def learning_rate_factor(args, epoch, share):
    """Return the factor of the learning rate in an epoch.

    share: the share of the run in [0, 1] that is done.
    """
    if args.schedule == "step":  # the template's MultiStepLR
        e = share * args.num_epoch if continuous(args) else epoch
        factor = 0.1 ** sum(e >= milestone for milestone in MILESTONES)
    else:  # cosine (Loshchilov & Hutter 2017); at 0 the first step of warm-up would be lost
        first = data_share(args, 0) / data_share(args, args.num_epoch - 1)
        warm_up = min(WARM_UP, 0.1 / args.num_epoch * min(1.0, first))
        factor = min(1.0, share / warm_up + 0.05) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    if args.fast_train and epoch < args.fast_train_epoch and "lr" not in args.given:
        factor *= FAST_LR
    return factor


def data_share(args, epoch):
    """Return the share in (0, 1] of the training data that an epoch sees."""
    fast = args.fast_train and epoch < args.fast_train_epoch
    return min(args.fast_partial, args.partial) if fast else args.partial


def continuous(args):
    """Return whether schedules move with every step, as in the pool recipe."""
    return args.recipe == "pool"


def share_done(model):
    """Return the share in [0, 1] of the run that is done, by steps or by --max_minutes."""
    budget, total = model.session.budget, model.session.total_steps
    if budget and budget.fitted:
        return budget.share()
    done = model.state.steps_done + model.session.step_offset
    return min(1.0, done / total) if total else 0.0


def schedule_epoch(model):
    """Return the epoch that sets a model's schedules, continuous in the pool's training stage."""
    if in_continuous_stage(model):
        return share_done(model) * model.args.num_epoch
    return model.current_epoch


def in_continuous_stage(model):
    """Return whether a model is in a training stage whose schedules move with every step."""
    return continuous(model.args) and bool(model.session.total_steps)


def next_learning_rate_factor(model, _=None):
    """Return the factor of --lr in a model's next step; the peak's outside a training stage."""
    share = share_done(model) if model.session.total_steps else WARM_UP
    return learning_rate_factor(model.args, model.current_epoch, share)


def set_learning_rate(model):
    """Set the optimizer's learning rate for the next step."""
    for group, peak in zip(model.optim.param_groups, model.scheduler.base_lrs):
        group["lr"] = peak * next_learning_rate_factor(model)


class kl_annealing:
    """Anneal the weight beta in [0, 1] of the KL term by whole epochs, with the template's names.

    args: kl_anneal_type (Cyclical, Monotonic or None, in any case), kl_anneal_cycle,
    kl_anneal_ratio, num_epoch; completed in place, as VAE_Model does, and read at every call, so
    that a change by a script holds. UserError for cycles below 1 and a ratio outside (0, 1].
    Fu et al. 2019.
    """

    frange_cycle_linear = staticmethod(frange_cycle_linear)

    def __init__(self, args, current_epoch=0):
        args = options.build_parser("", "").fill(args)
        options.check_kl_annealing(args)
        self.args, self.current_epoch = args, current_epoch
        cycles = kl_cycles(args)
        if args.kl_anneal_type == "Cyclical" and cycles < args.kl_anneal_cycle:
            say(f"--kl_anneal_cycle {args.kl_anneal_cycle} is more than {args.num_epoch} epochs "
                f"hold: {cycles} used")

    def update(self):
        """Advance to the next epoch."""
        self.current_epoch += 1

    def get_beta(self):
        """Return the current epoch's beta; after the last epoch, the last value."""
        return beta_of_epoch(self.args, self.current_epoch)
