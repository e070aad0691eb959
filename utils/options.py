"""Define the flags of Trainer.py and Tester.py, their checked ranges and the recipes.

A flag on the command line beats the recipe, the recipe beats the template's default.
"""

import argparse
import re
import shlex
import sys

from utils.cli import Parser, UserError, number, path, say

# values of a recipe for flags that are not given; other flags have the template's default
RECIPES = {
    "template": {},
    # measured: docs/EXPERIMENTS.md
    "pool": {
        "pool": 64, "train_vi_len": 2, "batch_size": 4, "optim": "Muon", "lr": 2e-3,
        "schedule": "cosine", "ema": 0.998, "refresh_norm": True, "tfr_min": 0.035,
        "tf_coin": "frame", "objective": "log_mse", "kl_weight": 1e-4,
    },
}
DEFAULT_RECIPE = "pool"

# flags of how and where to run, not of what to train: a checkpoint never sets them
OF_THE_MACHINE = {
    "save_root", "device", "gpu", "num_workers", "no_cache", "cache_dir", "ckpt_path", "resume",
    "test", "per_save", "save_every_steps", "max_minutes", "tensorboard", "store_visualization",
    "compile", "cuda_graphs",
}

# flags that name what a command works on; all others are settings
PLACES = {"DR", "save_root", "ckpt_path", "cache_dir", "device", "resume", "test"}

KL_ANNEAL_TYPES = {"cyclical": "Cyclical", "monotonic": "Monotonic",
                   "none": "None", "without": "None"}


def kl_anneal_type(text):
    """Return the name of a KL annealing strategy given in any case; "Without" is "None"."""
    try:
        return KL_ANNEAL_TYPES[str(text).lower()]
    except KeyError:
        message = f"{text!r} is not one of Cyclical, Monotonic, None"
        raise argparse.ArgumentTypeError(message) from None


def check_kl_annealing(args):
    """Set args.kl_anneal_type to its name. UserError for values out of range from a script."""
    try:
        args.kl_anneal_type = kl_anneal_type(args.kl_anneal_type)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--kl_anneal_type: {error}") from None
    if args.kl_anneal_cycle < 1:
        raise UserError(f"--kl_anneal_cycle {args.kl_anneal_cycle}: expected at least 1")
    if not 0 < args.kl_anneal_ratio <= 1:
        raise UserError(f"--kl_anneal_ratio {args.kl_anneal_ratio}: expected above 0 and at most 1")


def require(args, *flags):
    """Raise UserError for a flag, by its name, that is missing."""
    for flag in flags:
        if getattr(args, flag) is None:
            raise UserError(f"--{flag}: is missing; expected a path")


def require_one_checkpoint(args):
    """Raise UserError for several checkpoints in --ckpt_path, which training can't start from."""
    if len(as_list(args.ckpt_path)) > 1:
        raise UserError(f"--ckpt_path {shlex.join(args.ckpt_path)}: expected one checkpoint to "
                        f"train from; several are for --test")


def as_list(value):
    """Return the values of a flag that takes one or several, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


class OneOrMore(argparse.Action):
    """Keep a single value as it is, several as a list: third-party scripts expect a single one."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def device_name(text):
    """Check that a text is cuda, cuda:N, cpu or mps; `pick_device` checks that it exists."""
    if not re.fullmatch(r"cuda(:(0|[1-9]\d?))?|cpu|mps", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cuda, cuda:N, cpu or mps")
    return text


class RecipeParser(Parser):
    """Parse flags; take those that are not given from the recipe; list the others in `given`."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse as every ArgumentParser does; --help shows the defaults of the command's recipe."""
        words = sys.argv[1:] if args is None else list(args)
        self.recipe_of_help = recipe_of(words)
        unset = object()
        given = {} if namespace is None else vars(namespace)
        start = argparse.Namespace(**{a.dest: given.get(a.dest, unset) for a in self._actions})
        parsed, rest = super().parse_known_args(words, start)
        parsed = {**given, **{k: v for k, v in vars(parsed).items() if v is not unset}}
        flags = {action.dest for action in self._actions} - {"help"}
        parsed["given"] = sorted(flags & parsed.keys())
        parsed.setdefault("recipe", DEFAULT_RECIPE)
        return self.fill(argparse.Namespace(**parsed)), rest

    def format_help(self):
        """Return the help with the defaults in force."""
        recipe = RECIPES[getattr(self, "recipe_of_help", DEFAULT_RECIPE)]
        before = [action.default for action in self._actions]
        try:
            for action in self._actions:
                action.default = recipe.get(action.dest, action.default)
            return super().format_help()
        finally:
            for action, default in zip(self._actions, before):
                action.default = default

    def accept(self, settings, path):
        """Return the settings of a file that the command line would take; print the others."""
        accepted = {}
        for action in self._actions if isinstance(settings, dict) else ():
            if action.dest not in settings or action.dest == "help":
                continue
            value = settings[action.dest]
            try:
                if action.nargs == 0 and not isinstance(value, bool):
                    raise argparse.ArgumentError(action, f"{value!r} is not True or False")
                if action.nargs != 0 and not (value is None and action.default is None):
                    value = self._get_value(action, str(value))
                    self._check_value(action, value)
                accepted[action.dest] = value
            except argparse.ArgumentError as error:
                say(f"{path}: its setting is not taken: {' '.join(str(error).split())}")
        return accepted

    def fill(self, namespace):
        """Give `namespace` every flag that it lacks: its recipe's value, else the template's.

        A namespace without `recipe` was written for the template, and gets the template's.
        """
        namespace.given = getattr(namespace, "given", [])
        namespace.recipe = getattr(namespace, "recipe", "template")
        recipe = RECIPES[namespace.recipe]
        for action in self._actions:
            if action.dest != "help" and not hasattr(namespace, action.dest):
                setattr(namespace, action.dest, recipe.get(action.dest, action.default))
        return namespace


def recipe_of(words):
    """Return the recipe of a command line, a list of words, without a check of other flags."""
    recipe = DEFAULT_RECIPE
    for flag, value in zip(words, [*words[1:], ""]):
        flag, _, joined = str(flag).partition("=")
        if flag == "--recipe" and (joined or value) in RECIPES:
            recipe = joined or value
    return recipe


def build_parser(prog, description):
    """Return the parser of Trainer.py's and Tester.py's flags; its defaults are the template's."""
    parser = RecipeParser(
        prog=prog, description=description,
        epilog="The defaults shown are those of --recipe on this command line. Tester.py takes the "
               "flags of training for compatibility; of them --seed alone, the seed of z, has "
               "an effect there.")
    add_data_flags(parser.add_argument_group("data"))
    add_network_flags(parser.add_argument_group("network"))
    add_training_flags(parser.add_argument_group("training"))
    add_forcing_flags(parser.add_argument_group("teacher forcing"))
    add_loss_flags(parser.add_argument_group("loss"))
    add_running_flags(parser.add_argument_group("running"))
    add_rollout_flags(parser.add_argument_group("rollout"))
    return parser


SHARE = number(float, 0, 1)
NONZERO_SHARE = number(float, 0, 1, above=True)
COUNT = number(int, 1)
SWITCH = argparse.BooleanOptionalAction  # with a --no- form: a recipe or checkpoint can turn it on


def add_data_flags(group):
    """Add the flags of where the data are, and how much of them is used."""
    add = group.add_argument
    add("--DR", type=path, metavar="DIR", help="data folder, with train/, val/ and test/ in it")
    add("--save_root", type=path, metavar="DIR", help="folder for checkpoints, history and figures")
    size = number(int, 4, 4096)
    add("--frame_H", type=size, default=32, metavar="N", help="height that images are resized to")
    add("--frame_W", type=size, default=64, metavar="N", help="width that images are resized to")
    add("--num_workers", type=number(int, 0, 256), default=4, metavar="N",
        help="threads or processes that decode images")
    add("--no_cache", action="store_true",
        help="decode every image whenever it is used, as the template does")
    add("--cache_dir", type=path, metavar="DIR", help="where decoded frames are kept (None: "
        ".frame_cache in the data folder, else the user's cache folder)")
    add("--partial", type=NONZERO_SHARE, default=1.0, metavar="SHARE",
        help="training frames of an epoch, as a share of the data; in the pool recipe it sets the "
             "number of steps, and windows are drawn from all the data")
    add("--fast_train", action=SWITCH, default=False,
        help="fewer data and a larger learning rate in the first epochs")
    add("--fast_partial", type=NONZERO_SHARE, default=0.4, metavar="SHARE",
        help="--partial of the first epochs of --fast_train")
    add("--fast_train_epoch", type=number(int, 0), default=5, metavar="N",
        help="how many epochs --fast_train shortens")
    add("--train_vi_len", type=number(int, 2), default=16, metavar="N",
        help="frames of a training window, the given previous frame included")
    add("--val_vi_len", type=number(int, 2), default=630, metavar="N",
        help="frames of a validation or test sequence, the given first frame included")


def add_network_flags(group):
    """Add the flags of the network's sizes."""
    for name, least, default, what in (
            ("F_dim", 8, 128, "of the frame features"), ("L_dim", 2, 32, "of the pose features"),
            ("N_dim", 4, 12, "of z"), ("D_out_dim", 8, 192, "between decoder and generator")):
        size = number(int, least, 8192, multiple=least)
        group.add_argument(f"--{name}", type=size, default=default, metavar="N",
                           help=f"channels {what}")
    group.add_argument("--output", choices=("none", "clamp", "sigmoid"), default="none",
                       help="output activation of the generator, in training and in rollouts")


def add_training_flags(group):
    """Add the flags of the recipe, the optimizer and the length of a run."""
    add = group.add_argument
    add("--recipe", choices=tuple(RECIPES), default=DEFAULT_RECIPE,
        help="pool: training on a pool of rollouts, which scores highest; template: the template's "
             "windows, optimizer, schedules and loop")
    add("--batch_size", type=COUNT, default=2, metavar="N", help="windows a step, on each GPU")
    add("--lr", type=number(float, 0, 10, above=True), default=0.001, metavar="LR",
        help="peak learning rate; if it is given, --fast_train does not raise it")
    add("--optim", choices=("Adam", "AdamW", "Muon"), default="Adam",
        help="optimizer; Muon orthogonalizes the momentum of convolution weights (utils/muon.py)")
    add("--schedule", choices=("step", "cosine"), default="step",
        help="learning rate schedule; step: divided by 10 at epoch 2 and again at epoch 5, as in "
             "the template; cosine: warm-up, then down to 0 over the run")
    add("--num_epoch", type=number(int, 1, 100_000), default=70, metavar="N", help="epochs in all")
    add("--max_minutes", type=number(float, 0, 1e6, above=True), metavar="M",
        help="end within M minutes, with every schedule fitted to them (None: no limit)")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="S",
        help="seed of weights, windows, teacher forcing and noise")
    add("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY",
        help="validate and keep an exponential moving average of the weights (0: none)")
    add("--refresh_norm", action=SWITCH, default=False,
        help="recalibrate BatchNorm on training poses before validating and saving")
    add("--pool", type=number(int, 0, 65536), default=0, metavar="N",
        help="rollouts that give the training windows their previous frame (0: the true one)")
    add("--next_share", type=SHARE, default=0.5, metavar="P",
        help="probability that a rollout of the pool predicts the next frame of its clip, "
             "else a random frame of the clip")


def add_forcing_flags(group):
    """Add the flags of the schedule of teacher forcing."""
    add = group.add_argument
    add("--tfr", type=SHARE, default=1.0, metavar="P",
        help="teacher forcing ratio at the start: the probability of the true previous frame")
    add("--tfr_sde", type=number(int, 0), default=10, metavar="EPOCH",
        help="epoch by which the ratio has dropped once")
    add("--tfr_d_step", type=SHARE, default=0.1, metavar="STEP", help="how much it drops an epoch")
    add("--tfr_min", type=SHARE, default=0.0, metavar="P", help="floor of the ratio")
    add("--tf_coin", choices=("epoch", "batch", "frame"), default="epoch",
        help="how often teacher forcing is sampled: once an epoch, a batch, or for every "
             "frame (in the pool: for every rollout)")


def add_loss_flags(group):
    """Add the flags of the loss and of KL annealing. RECIPES overrides some defaults."""
    add = group.add_argument
    add("--objective", choices=("mse", "log_mse"), default="mse",
        help="reconstruction term: the MSE, or the logarithm of each frame's, which is what PSNR "
             "counts")
    add("--kl_anneal_type", type=kl_anneal_type, default="Cyclical", metavar="TYPE",
        help="Cyclical, Monotonic or None (beta is 1 throughout)")
    add("--kl_anneal_cycle", type=COUNT, default=10, metavar="N", help="cycles of Cyclical")
    add("--kl_anneal_ratio", type=NONZERO_SHARE, default=1.0, metavar="SHARE",
        help="share of a cycle in which beta climbs")
    add("--kl_weight", type=number(float, 0), default=1.0, metavar="W",
        help="weight of the KL term in nats, times beta")


def add_running_flags(group):
    """Add the flags of the machine, of checkpoints and of logs."""
    add = group.add_argument
    add("--device", type=device_name, metavar="DEVICE",
        help="cuda, cuda:N, cpu or mps (None: cuda where there is one, else cpu)")
    add("--gpu", type=COUNT, default=1, metavar="N", help="GPUs wanted; above 1 needs torchrun")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 where the hardware is fast in it, else fp32; on an older GPU a timing "
             "picks fp16 or fp32")
    add("--compile", action=SWITCH, default=False,
        help="compile the networks with torch.compile, which takes minutes first")
    add("--no_compile", dest="compile", action="store_false", default=False,
        help=argparse.SUPPRESS)
    add("--cuda_graphs", action=SWITCH, default=True,
        help="on a GPU, replay rollouts and, for windows of 2 on one GPU, the networks and "
             "optimizer of training steps as CUDA graphs")
    add("--checkpoint_steps", action=SWITCH, default=False,
        help="recompute activations in the backward pass: long windows in less memory")
    add("--ckpt_path", type=path, nargs="+", action=OneOrMore, metavar="FILE",
        help="checkpoint to load, from which training resumes; several are tested as one, each "
             "frame the mean of their predictions")
    add("--resume", action="store_true",
        help="resume from save_root/last.ckpt; start from scratch where there is none")
    add("--test", action="store_true",
        help="Trainer: validate --ckpt_path and stop; Tester does nothing else anyway")
    add("--per_save", type=COUNT, default=3, metavar="N",
        help="keep epoch={n}.ckpt when n is a multiple of N")
    add("--save_every_steps", type=number(int, 0), default=2000, metavar="N",
        help="also write last.ckpt every N steps within an epoch (0: no)")
    add("--tensorboard", action="store_true",
        help="also log to save_root/tensorboard (needs the tensorboard package)")


def add_rollout_flags(group):
    """Add the flags of how validation and test sequences are generated."""
    group.add_argument("--z", choices=("prior", "zero"), default="prior",
                       help="prior: z from N(0, I) at every step; zero: z = 0, the prior's mean")
    group.add_argument("--rollouts", type=number(int, 1, 64), default=1, metavar="N",
                       help="mean of N rollouts, each with its own noise")


def unlike_template(args):
    """Return the flags whose values differ from the template's defaults, as one line."""
    flags = []
    for action in build_parser("", "")._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in PLACES | {"help"} or value == action.default:
            continue
        if action.nargs == 0:
            flags.append(f"--{'' if value else 'no-'}{action.dest}")
        else:
            value = f"{value:g}" if isinstance(value, float) else value
            flags.append(f"--{action.dest} {value}")
    return " ".join(dict.fromkeys(flags))
