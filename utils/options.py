"""The flags of Trainer.py and Tester.py, their checked ranges and the recipes.

A flag on the command line beats the recipe, the recipe beats the template's default.
"""

import argparse
import re

from utils.cli import Parser, UserError, number, path, say

# What a recipe sets where the command line says nothing; all else has the template's default.
RECIPES = {
    "template": {},
    # measured: docs/RECIPE.md
    "pool": dict(pool=64, train_vi_len=2, batch_size=4, lr=2e-3, tfr_min=0.035, tf_coin="frame", optim="Muon",
                 schedule="cosine", ema=0.998, objective="log_mse", kl_weight=1e-4, refresh_norm=True),
}
DEFAULT_RECIPE = "pool"

# flags that say how and where to run, not what to train: a checkpoint never decides them
OF_THE_MACHINE = {"save_root", "device", "gpu", "num_workers", "no_cache", "cache_dir", "ckpt_path", "resume", "test", "per_save",
                  "save_every_steps", "max_minutes", "tensorboard", "store_visualization", "compile"}

KL_ANNEAL_TYPES = {"cyclical": "Cyclical", "monotonic": "Monotonic", "none": "None", "without": "None"}


def kl_anneal_type(text):
    """The canonical name of a KL annealing strategy, in any case; None and "Without" are "None"."""
    try:
        return KL_ANNEAL_TYPES[str(text).lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of Cyclical, Monotonic, None") from None


def check_kl_annealing(args):
    """Give args.kl_anneal_type its canonical name. UserError for values out of range, as other people's scripts set them."""
    try:
        args.kl_anneal_type = kl_anneal_type(args.kl_anneal_type)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--kl_anneal_type: {error}") from None
    if args.kl_anneal_cycle < 1:
        raise UserError(f"--kl_anneal_cycle {args.kl_anneal_cycle}: expected at least 1")
    if not 0 < args.kl_anneal_ratio <= 1:
        raise UserError(f"--kl_anneal_ratio {args.kl_anneal_ratio}: expected above 0 and at most 1")


def require(args, *flags):
    """Raise UserError for a flag that is missing."""
    for flag in flags:
        if getattr(args, flag) is None:
            raise UserError(f"--{flag}: is missing; expected a path")


def as_list(value):
    """Return the values of a flag that takes one or several, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


class OneOrMore(argparse.Action):
    """Keep a single value as it is, several as a list: other people's scripts expect one --ckpt_path."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def device_name(text):
    """cuda, cuda:N, cpu or mps; whether it is there is found out when it is used."""
    if not re.fullmatch(r"cuda(:\d+)?|cpu|mps", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cuda, cuda:N, cpu or mps")
    return text


class RecipeParser(Parser):
    """A Parser that fills flags not on the command line from the recipe, and lists those that were in `given`."""

    def parse_known_args(self, args=None, namespace=None):
        unset = object()
        given = {} if namespace is None else vars(namespace)
        start = argparse.Namespace(**{action.dest: given.get(action.dest, unset) for action in self._actions})
        parsed, rest = super().parse_known_args(args, start)
        parsed = argparse.Namespace(**{**given, **{k: v for k, v in vars(parsed).items() if v is not unset}})
        flags = {action.dest for action in self._actions} - {"help"}
        parsed.given = sorted(flags & vars(parsed).keys())
        return self.fill(parsed), rest

    def accept(self, settings, path):
        """The settings of a file that are flags with values that the command line takes too, as a dict; says what isn't."""
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
        """Give `namespace` every flag that it lacks: the value of its recipe, else the template's default.

        A namespace without `recipe` is somebody's who knows the template only: it gets the template's recipe.
        """
        if not hasattr(namespace, "given"):
            namespace.given, namespace.recipe = [], getattr(namespace, "recipe", "template")
        elif not hasattr(namespace, "recipe"):
            namespace.recipe = DEFAULT_RECIPE
        recipe = RECIPES[namespace.recipe]
        for action in self._actions:
            if action.dest != "help" and not hasattr(namespace, action.dest):
                setattr(namespace, action.dest, recipe.get(action.dest, action.default))
        return namespace


def build_parser(prog, description):
    """The flags that Trainer.py and Tester.py share, as a RecipeParser. Defaults are the template's."""
    parser = RecipeParser(prog=prog, description=description, epilog="Defaults in the recipe 'pool' differ: see --recipe "
                          "and the README. Flags of training are taken by Tester.py for compatibility and change nothing there.")

    data = parser.add_argument_group("data")
    data.add_argument("--DR", type=path, metavar="DIR", help="data folder, with train/, val/ and test/ in it")
    data.add_argument("--save_root", type=path, metavar="DIR", help="folder for checkpoints, history and pictures")
    data.add_argument("--frame_H", type=number(int, 4, 4096), default=32, metavar="N", help="height that pictures are resized to")
    data.add_argument("--frame_W", type=number(int, 4, 4096), default=64, metavar="N", help="width that pictures are resized to")
    data.add_argument("--num_workers", type=number(int, 0, 256), default=4, metavar="N", help="threads or processes that decode pictures")
    data.add_argument("--no_cache", action="store_true", help="decode every picture whenever it is used, as the template does")
    data.add_argument("--cache_dir", type=path, metavar="DIR", help="where decoded frames are kept (None: .frame_cache beside the data, else the user's cache folder)")
    data.add_argument("--partial", type=number(float, 0, 1, above=True), default=1.0, metavar="SHARE", help="share of the training data an epoch sees")
    data.add_argument("--fast_train", action="store_true", help="fewer data and a larger learning rate in the first epochs")
    data.add_argument("--fast_partial", type=number(float, 0, 1, above=True), default=0.4, metavar="SHARE", help="share of the training data in the first epochs of --fast_train")
    data.add_argument("--fast_train_epoch", type=number(int, 0), default=5, metavar="N", help="how many epochs --fast_train shortens")
    data.add_argument("--train_vi_len", type=number(int, 2), default=16, metavar="N", help="frames of a training window, the first of them the past frame")
    data.add_argument("--val_vi_len", type=number(int, 2), default=630, metavar="N", help="frames of a validation or test sequence, the first of them given")

    network = parser.add_argument_group("network")
    network.add_argument("--F_dim", type=number(int, 8, 8192, multiple=8), default=128, metavar="N", help="channels of the frame features")
    network.add_argument("--L_dim", type=number(int, 2, 8192, multiple=2), default=32, metavar="N", help="channels of the pose features")
    network.add_argument("--N_dim", type=number(int, 4, 8192, multiple=4), default=12, metavar="N", help="channels of z")
    network.add_argument("--D_out_dim", type=number(int, 8, 8192, multiple=8), default=192, metavar="N", help="channels between decoder and generator")
    network.add_argument("--output", choices=("none", "clamp", "sigmoid"), default="none", help="what follows the generator in training and rollout; kept in the checkpoint")

    training = parser.add_argument_group("training")
    training.add_argument("--recipe", choices=tuple(RECIPES), default=DEFAULT_RECIPE, help="pool: training on running rollouts, measured to score highest; template: the template's windows, optimizer, schedule and loop")
    training.add_argument("--batch_size", type=number(int, 1), default=2, metavar="N", help="windows a step (on each GPU)")
    training.add_argument("--lr", type=number(float, 0, 10, above=True), default=0.001, metavar="RATE", help="learning rate at its peak; given, --fast_train does not raise it")
    training.add_argument("--optim", choices=("Adam", "AdamW", "Muon"), default="Adam", help="optimizer; Muon makes the momentum of each convolution orthogonal before a step (muon.py)")
    training.add_argument("--schedule", choices=("step", "cosine"), default="step", help="step: the template's, a tenth from epochs 2 and 5 on; cosine: warm-up, then down to 0 over the run")
    training.add_argument("--num_epoch", type=number(int, 1, 100_000), default=70, metavar="N", help="epochs in all")
    training.add_argument("--max_minutes", type=number(float, 0, 1e6, above=True), metavar="M", help="end within M minutes, with every schedule fitted to them (None: no limit)")
    training.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="S", help="seed of weights, windows, coins and noise")
    training.add_argument("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY", help="validate and keep an exponential average of the weights (0: the weights themselves)")
    training.add_argument("--refresh_norm", action="store_true", help="recompute BatchNorm's statistics over the training poses before validating and saving")
    training.add_argument("--pool", type=number(int, 0, 65536), default=0, metavar="LANES", help="running rollouts that give the training windows their past frame (0: windows start from ground truth)")
    training.add_argument("--next_share", type=number(float, 0, 1), default=0.5, metavar="SHARE", help="chance that a lane of the pool goes on to the next frame, else to a random one of its clip")

    forcing = parser.add_argument_group("teacher forcing")
    forcing.add_argument("--tfr", type=number(float, 0, 1), default=1.0, metavar="SHARE", help="chance of ground truth as the history, at the start")
    forcing.add_argument("--tfr_sde", type=number(int, 0), default=10, metavar="EPOCH", help="epoch in which that chance begins to drop")
    forcing.add_argument("--tfr_d_step", type=number(float, 0, 1), default=0.1, metavar="STEP", help="how much it drops an epoch")
    forcing.add_argument("--tfr_min", type=number(float, 0, 1), default=0.0, metavar="SHARE", help="what it never drops below")
    forcing.add_argument("--tf_coin", choices=("epoch", "batch", "frame"), default="epoch", help="how often the coin of teacher forcing is tossed")

    kl = parser.add_argument_group("loss")
    kl.add_argument("--objective", choices=("mse", "log_mse"), default="mse", help="what measures the reconstruction: mean squared error, or the logarithm of each picture's, which is what PSNR counts")
    kl.add_argument("--kl_anneal_type", type=kl_anneal_type, default="Cyclical", metavar="TYPE", help="Cyclical, Monotonic or None (beta is 1 throughout)")
    kl.add_argument("--kl_anneal_cycle", type=number(int, 1), default=10, metavar="N", help="cycles of Cyclical")
    kl.add_argument("--kl_anneal_ratio", type=number(float, 0, 1, above=True), default=1.0, metavar="SHARE", help="share of a cycle in which beta climbs")
    kl.add_argument("--kl_weight", type=number(float, 0), default=1.0, metavar="W", help="weight of the KL term (in nats, the natural unit of information) beside the reconstruction, times beta")

    running = parser.add_argument_group("running")
    running.add_argument("--device", type=device_name, metavar="DEVICE", help="cuda, cuda:N, cpu or mps (None: cuda where there is one, else cpu)")
    running.add_argument("--gpu", type=number(int, 1), default=1, metavar="N", help="GPUs wanted; above 1 needs torchrun")
    running.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: what is fastest on this machine, printed at the start")
    running.add_argument("--compile", action="store_true", help="torch.compile the networks for training; its gain was not measured on a GPU")
    running.add_argument("--no_compile", dest="compile", action="store_false", default=False, help="the default; taken for old commands")
    running.add_argument("--checkpoint_steps", action="store_true", help="recompute activations step by step in the backward pass: long windows in less memory")
    running.add_argument("--ckpt_path", type=path, nargs="+", action=OneOrMore, metavar="FILE", help="checkpoint to load; training resumes from it. Several: tested as one, each frame the mean of their predictions")
    running.add_argument("--resume", action="store_true", help="go on from save_root/last.ckpt, from scratch where there is none")
    running.add_argument("--test", action="store_true", help="Trainer: validate --ckpt_path and stop; Tester does nothing else anyway")
    running.add_argument("--per_save", type=number(int, 1), default=3, metavar="N", help="keep epoch={n}.ckpt when n is a multiple of N")
    running.add_argument("--save_every_steps", type=number(int, 0), default=0, metavar="N", help="also write last.ckpt every N steps within an epoch (0: no)")
    running.add_argument("--tensorboard", action="store_true", help="also log to save_root/tensorboard (needs the tensorboard package)")

    rollout = parser.add_argument_group("rollout")
    rollout.add_argument("--z", choices=("prior", "zero"), default="prior", help="prior: z from N(0, I) at every step; zero: its mean")
    rollout.add_argument("--rollouts", type=number(int, 1, 64), default=1, metavar="N", help="mean of N rollouts with noise of their own")
    return parser
