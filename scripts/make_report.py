#!/usr/bin/env python3
"""Write the report of training runs: report.md, and report.html that needs nothing but a browser.

    python scripts/make_report.py ckpt -o report
    python scripts/make_report.py --best ckpt --kl runs_kl/{Cyclical,Monotonic,None} \\
        --tfr runs_tfr/{always,decay_late,decay_early,never} \\
        -o report --student_id 313553009 --name 林于翔

A RUN is a folder that Trainer.py wrote (its --save_root); one run may serve several sections.
Sections are the assignment's rubric: --kl has the runs of C.ii (loss curves), --tfr those of C.i
(teacher forcing), --best that of B. Without --best, B takes the run with the highest validation
PSNR. C.i and C.ii without runs of their own take RUN..., else the run of B. C.iii takes --best and
RUN..., else all runs. The figures of plot_runs.py, the best and worst frames and the two reports
are written to OUT. Numbers come from history.csv, steps.csv and psnr_per_frame.csv, frames from
val_pred.gif, settings from last.ckpt (else best.ckpt). What has no data is left out and noted.
The user writes the analysis as Markdown into the marked places of report.md. A later call keeps
this text and renders it in report.html (with markdown-it-py, else as plain text). A report.md that
was edited elsewhere, and a report.html that was edited and saved, are renamed, not replaced.
A browser's "Save as PDF" of report.html is the submission; --student_id and --name name the file.
"""

import ast
import itertools
import re
import sys
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import plot_runs  # noqa: E402
from package import name_part  # noqa: E402
from plot_runs import write  # noqa: E402
from report_frames import add_frames, frames_figure, player_data, sprite_sheets  # noqa: E402
from report_page import markdown_renderer, write_page  # noqa: E402
from report_tables import (
    against_template,
    beta_table,
    forcing_table,
    loss_table,
    psnr_table,  # noqa: E402
    read_settings,
    runs_table,
    settings_tables,
    single_epochs,
    speed_table,
    split_columns,
    warnings,
    with_settings,
)
from run_folders import by_objective, load_runs, objective  # noqa: E402
from utils.cli import Parser, UserError, run  # noqa: E402
from utils.files import make_folder  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("Trainer.py", "Tester.py", "dataloader.py", "modules/modules.py", "utils/*.py")
TITLE = "Lab 4: Conditional VAE for Video Prediction"
# what report.html may weigh; above it, frames are stored with loss, and the page says so
PAGE_BYTES = 9_500_000

X_AXIS = (
    "Epoch e of history.csv reaches from e to e + 1 on the x axis, the last one of --max_minutes "
    "as far as its steps went; validation comes at its end."
)
CAPTIONS = {
    "loss_curves": "Training with each KL strategy. Thin: steps.csv; marks: means over the epochs. "
    + X_AXIS
    + " The "
    "total is reconstruction + beta * kl_weight * KL, so the totals of runs with different beta "
    "measure different things; reconstruction, MSE and KL can be compared.",
    "loss_parts": "What the total loss is made of: the black line is the recorded total, the "
    "areas are its two terms.",
    "beta_schedules": "Beta as it was, by step. Runs with the same schedule share a panel.",
    "teacher_forcing": "Teacher forcing ratio (line), the teacher-forced share (dots), and "
    "under them, on the "
    "same x axis, the training loss. " + X_AXIS,
    "teacher_forcing_losses": "The same runs together: ratio, training reconstruction, and "
    "validation PSNR, where every previous frame is a generated one.",
    "val_psnr": "Validation PSNR by epoch: mean over the frames of the rollout, and its last "
    "frame.",
    "psnr_per_frame": "PSNR of every frame of the validation rollout, best epoch of each run.",
}
LATE_MSE = (
    "Training MSE and validation PSNR are not measured on the same thing, so both may rise late. "
    "The log-MSE that is minimised counts the relative error of each frame, as PSNR does; the mean "
    "MSE is dominated by the few worst frames. In training the previous frame is more and more "
    "often a generated one as the ratio decays, in the pool recipe many frames to predict are "
    "not the next ones of their clip, and z carries less information about them as KL falls. "
    "Validation predicts the next frame, with z from N(0, I)."
)
PROMPTS = {
    "A": "what is predicted from what; why it is hard (each of 629 frames is predicted from a "
    "generated one); what you compared and found, in one sentence.",
    "B.i": "walk through the code above: what happens in a training step, what in a rollout, and "
    "what differs.",
    "B.ii": "why z is written as mu + exp(logvar / 2) * eps, and why the network predicts the log "
    "variance.",
    "B.iii": "from which ratio to which, when, and why.",
    "B.iv": "which schedule, with which weight, and why.",
    "C.i": "what the loss does where the ratio drops, and whether the lowest training loss has "
    "the highest PSNR.",
    "C.ii": "which term each strategy lowers and when; KL where beta returns to 0; which has the "
    "best PSNR, and why.",
    "C.iii": "whether errors accumulate; which frames are worst, and what is special about their "
    "poses.",
    "C.iv": "what else you changed, what it gained, and how you know.",
}


# ---------------------------------------------------------------- reading


def find_node(body, parts):
    """Return the definition of a qualified name, its `parts`, in a module's body, or None."""
    node = None
    for part in parts:
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next((n for n in body if isinstance(n, kinds) and n.name == part), None)
        if node is None:
            return None
        body = node.body
    return node


def source(name):
    """Return file, name, line and text of a function without importing it; None if not found."""
    for path in (p for pattern in SOURCES for p in sorted(ROOT.glob(pattern))):
        try:
            text = path.read_text(encoding="utf-8")
            node = find_node(ast.parse(text).body, name.split("."))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if node is not None:
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            indent = len(lines[0]) - len(lines[0].lstrip())
            return SimpleNamespace(
                file=path.relative_to(ROOT).as_posix(),
                name=name,
                line=node.lineno,
                text="\n".join(line[indent:] for line in lines),
            )
    return None


def load_sections(args):
    """Return the runs by section, each read once: best, kl, tfr, frames (C.iii), all, uses."""
    given = {
        "best": [args.best] if args.best else [],
        "kl": args.kl,
        "tfr": args.tfr,
        "runs": args.runs,
    }
    for name, paths in given.items():
        if len({Path(p).resolve() for p in paths}) < len(paths):
            raise UserError(
                f"{'RUN' if name == 'runs' else '--' + name}: the same folder is given twice"
            )
    paths = list({Path(p).resolve(): p for paths in given.values() for p in paths}.values())
    if not paths:
        raise UserError("RUN: expected at least one run folder (or --best, --kl, --tfr)")
    runs = load_runs(paths)
    for r in runs:
        r.settings = read_settings(r.path)
        add_frames(r)
    by_path = {r.path.resolve(): r for r in runs}
    own = {name: [by_path[Path(p).resolve()] for p in paths] for name, paths in given.items()}
    score = lambda r: np.nan_to_num(r.history["val_psnr_mean"], nan=-np.inf, posinf=-np.inf).max()
    best = own["best"][0] if own["best"] else max(runs, key=score)
    fallback = own["runs"] or [best]
    shown = list(dict.fromkeys(own["best"] + own["runs"])) or runs
    sections = SimpleNamespace(
        best=best, kl=own["kl"] or fallback, tfr=own["tfr"] or fallback, frames=shown, all=runs
    )
    places = [
        ("B", [best]),
        ("C.i", sections.tfr),
        ("C.ii", sections.kl),
        ("C.iii", shown),
        ("C.iv", runs),
    ]
    sections.uses = [(r, ", ".join(p for p, members in places if r in members)) for r in runs]
    return sections


def draw_figures(sections, out):
    """Draw and write all figures; return {name: PNG bytes} and {name: line on what is left out}."""
    with_best = sections.kl + [sections.best] * (sections.best not in sections.kl)
    figures, left_out = {}, {}
    for runs, functions in [
        (sections.kl, (plot_runs.loss_curves, plot_runs.loss_parts)),
        (with_best, (plot_runs.beta_schedules,)),
        (sections.tfr, (plot_runs.teacher_forcing, plot_runs.teacher_forcing_losses)),
        (sections.frames, (plot_runs.psnr_per_frame, plot_runs.psnr_summary)),
        (sections.all, (plot_runs.val_psnr,)),
    ]:
        images, lines = plot_runs.write_figures(runs, out, functions)
        figures.update(images)
        left_out.update(lines)
    taken = set()
    for r in sections.frames:
        name = "frames_" + re.sub(r"[^\w.-]+", "_", r.name)
        names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
        # macOS and Windows do not tell capitals apart
        r.file = next(name for name in names if name.casefold() not in taken)
        taken.add(r.file.casefold())
        if r.frames is not None and r.psnr is not None and np.isfinite(r.psnr["psnr"]).any():
            figures[r.file] = plot_runs.write_figure(frames_figure(r), r.file, out)
    return figures, left_out


# ---------------------------------------------------------------- the report as a list of blocks


class Blocks(list):
    """Hold the report as blocks (kind, content), which to_markdown and report_page write out.

    Kinds: h2, h2 same (no new page), h3, p, missing, table, pairs, figure (name, caption), code
    (functions), analysis (key, prompt), player.
    """

    def __init__(self, figures, left_out):
        super().__init__()
        self.figures, self.left_out = figures, left_out

    def add(self, kind, content):
        """Add a block, unless it is empty."""
        if content:
            self.append((kind, content))

    def figure(self, name, caption=None, suffix=""):
        """Add a figure, or the line on why it was left out."""
        if name + suffix in self.figures:
            self.add("figure", (name + suffix, caption or CAPTIONS[name]))
        if name + suffix in self.left_out:
            self.add("missing", f"Figure {self.left_out[name + suffix]}.")

    def settings(self, runs, flags=None):
        """Add how the runs' flags differ from the template's and from each other."""
        sentence, rows = against_template(runs, flags)
        self.add("p", sentence)
        for part in split_columns(rows, keep=2):
            self.add("table", part)

    def code(self, *names):
        """Add the source of functions, by name."""
        found = [source(name) for name in names]
        self.add("code", [f for f in found if f])
        for name in (name for name, f in zip(names, found) if not f):
            self.add("missing", f"`{name}`: not found in this copy of the project.")

    def analysis(self, key):
        """Add a place for the writer's analysis."""
        self.append(("analysis", (key, PROMPTS[key])))


def any_setting(runs, test):
    return any(test(r.settings) for r in with_settings(runs))


def add_overview(b, s):
    """Add the table of runs, section A and the heading of B."""
    b.add("h2 same", "Runs")
    b.add("table", runs_table(s.uses))
    unknown = [r.label for r in s.all if r.settings is None]
    if unknown:
        b.add(
            "missing",
            f"Settings of {', '.join(unknown)} are not known (no last.ckpt or best.ckpt that holds "
            f"them, or no PyTorch here to read it), so the tables of settings leave "
            f"{'them' if len(unknown) > 1 else 'it'} out.",
        )
    b.add("h2 same", "A. Introduction (5%)")
    b.analysis("A")
    b.add("h2", "B. Implementation details (30%)")


def add_protocol(b, s):
    """Add B.i, the protocol of training and testing."""
    pool = any_setting([s.best], lambda v: v.get("pool"))
    b.add("h3", "B.i How do you write your training/testing protocol (15%)")
    b.settings([s.best])
    b.add(
        "p",
        "Training. For every frame to predict, `RGB_Encoder` encodes the previous frame, "
        "`Label_Encoder` the pose, and `Gaussian_Predictor` the frame itself together with its "
        "pose into mu and logvar, from which z is drawn. `Decoder_Fusion` joins previous frame, "
        "pose and z, and `Generator` makes the frame. The previous frame is ground truth under "
        "teacher forcing, else a generated one. The loss is the reconstruction ("
        + (
            "the logarithm of each frame's MSE, 1e-3 log(1 + MSE / 1e-5)"
            if objective(s.best) == "log-MSE"
            else "the mean squared error"
        )
        + ") plus beta * kl_weight times the KL divergence between N(mu, exp(logvar)) and N(0, I). "
        "The gradient's norm is clipped before each step of the optimizer.",
    )
    if pool:
        b.add(
            "p",
            "A pool of rollouts is kept beside the training: the previous frame of a training "
            "window is the one that its rollout generated last, and the prediction takes its "
            "place.",
        )
    zero = any_setting([s.best], lambda v: v.get("z") == "zero")
    z = "z is 0" if zero else "z comes from the prior N(0, I)"
    b.add(
        "p",
        "Testing. The first frame and all poses are given, nothing else: "
        + (f"{z} at every step, " if s.best.settings else "")
        + "every generated frame is clamped to [0, 1] and becomes the "
        "previous frame of the next step, and BatchNorm uses its running statistics. The PSNR of a "
        "frame is -10 log10 of its mean squared error; the score of a rollout is the mean over "
        "its frames.",
    )
    b.code("VAE_Model.training_one_step", "VAE_Model.forward", "VAE_Model.loss_terms")
    b.code("VAE_Model.rollout", "VAE_Model.rollout_block", "Test_model.eval")
    b.analysis("B.i")


def add_tricks(b, s):
    """Add B.ii, B.iii and B.iv: reparameterization, teacher forcing and KL annealing."""
    pool = any_setting([s.best], lambda v: v.get("pool"))
    b.add("h3", "B.ii How do you implement reparameterization tricks (5%)")
    b.settings([s.best], ["N_dim"])
    b.add(
        "p",
        "z = mu + exp(logvar / 2) * eps with eps from N(0, I): the randomness is in eps alone, so "
        "gradients pass through mu and logvar. The network gives the log variance, which may be "
        "any real number: the variance is positive without a constraint.",
    )
    b.code("Gaussian_Predictor.reparameterize")
    b.analysis("B.ii")

    b.add("h3", "B.iii How do you set your teacher forcing strategy (5%)")
    b.settings(
        [s.best],
        ["tfr", "tfr_sde", "tfr_d_step", "tfr_min", "tf_coin", "num_epoch", "max_minutes"],
    )
    continuous = any_setting([s.best], lambda v: v.get("recipe") == "pool")
    by_step = (
        "In the pool recipe e is continuous, the share of the run that is done times "
        "`--num_epoch`, also where `--max_minutes` ends the run after fewer epochs."
    )
    by_epoch = "In the template's recipe e is the whole epoch."
    b.add(
        "p",
        "The ratio is the probability that a step's previous frame is ground truth. With epochs e "
        "from 0: tfr(e) = max(tfr_min, tfr - tfr_d_step * max(0, e - tfr_sde + 1)). "
        + ((by_step if continuous else by_epoch) if s.best.settings else "")
        + (" A rollout of the pool restarts from ground truth with that probability." * pool),
    )
    b.add("table", forcing_table([s.best]))
    b.code(
        "teacher_forcing_ratio", "VAE_Model.sample_teacher_forcing", *["RolloutPool.draw"] * pool
    )
    b.analysis("B.iii")

    b.add("h3", "B.iv How do you set your kl annealing ratio (5%)")
    b.settings(
        [s.best], ["kl_anneal_type", "kl_anneal_cycle", "kl_anneal_ratio", "kl_weight", "objective"]
    )
    b.add(
        "p",
        "beta in [0, 1] multiplies kl_weight * KL (Fu et al. 2019). Cyclical: in each cycle beta "
        "climbs linearly from 0 to 1 over the first `--kl_anneal_ratio` of the cycle and then "
        "stays at 1. Monotonic: one such cycle over the whole run. Without annealing it is 1 "
        "throughout. The table has what was in force:",
    )
    b.add("table", beta_table([s.best, *(r for r in s.kl if r is not s.best)]))
    b.figure("beta_schedules")
    b.code("beta_at", "kl_cycles", "frange_cycle_linear")
    b.analysis("B.iv")


def add_comparisons(b, s):
    """Add the heading of C, and C.i and C.ii: teacher forcing and loss curves."""
    b.add("h2", "C. Analysis & Discussion (25%)")
    b.add("h3", "C.i Plot Teacher forcing ratio (5%): analysis, and comparison with the loss curve")
    for suffix, name, runs in by_objective(s.tfr):
        b.add("p", f"Runs whose reconstruction is {name}:" if suffix else None)
        b.settings(runs)
        for line in warnings(runs, "tfr", "teacher forcing ratio"):
            b.add("p", line)
        b.add("p", single_epochs(runs))
        b.figure("teacher_forcing", suffix=suffix)
        b.figure("teacher_forcing_losses", suffix=suffix)
        b.add("table", forcing_table(runs))
    b.analysis("C.i")

    b.add(
        "h3",
        "C.ii Plot the loss curve while training with different settings; analyze the difference "
        "between them (15%)",
    )
    kinds = {
        str(r.settings["kl_anneal_type"])
        for r in with_settings(s.kl)
        if "kl_anneal_type" in r.settings
    }
    absent = [k for k in ("Monotonic", "Cyclical", "None") if k not in kinds]
    if kinds and absent:
        b.add(
            "missing",
            "The assignment asks for KL annealing Monotonic, Cyclical and without. Not among these "
            "runs: "
            f"{', '.join(absent)}.",
        )
    for suffix, name, runs in by_objective(s.kl):
        b.add("p", f"Runs whose reconstruction is {name}:" if suffix else None)
        b.settings(runs)
        for line in warnings(runs, "beta", "beta"):
            b.add("p", line)
        b.add("p", single_epochs(runs))
        late = " " + LATE_MSE if name == "log-MSE" else ""
        b.figure("loss_curves", CAPTIONS["loss_curves"] + late, suffix)
        b.figure("loss_parts", suffix=suffix)
        b.add("table", loss_table(runs))
    b.analysis("C.ii")


def add_validation(b, s, player_note):
    """Add C.iii and C.iv: PSNR per frame, and other training strategies."""
    b.add("h3", "C.iii Plot the PSNR-per-frame diagram in the validation dataset (5%)")
    b.settings(s.frames, None if s.frames != [s.best] else ["z", "rollouts", "val_vi_len"])
    b.figure("psnr_per_frame")
    if "psnr_summary" in b.figures:
        b.add("table", psnr_table(s.frames))
    elif "psnr_summary" in b.left_out:
        b.add("missing", f"Table {b.left_out['psnr_summary']}.")
    for r in s.frames:
        b.add("missing", r.problem)
    if any(r.frames is not None for r in s.frames):
        b.append(("player", player_note))
    for r in s.frames:
        b.figure(
            r.file,
            f"{r.label}: frames with the highest and the lowest PSNR of the validation rollout, "
            f"chosen apart "
            "from each other. Pose, prediction, ground truth.",
        )
    b.analysis("C.iii")

    b.add("h3", "C.iv Other training strategy analysis (Bonus 10%)")
    b.settings(
        s.all,
        [
            "recipe",
            "optim",
            "schedule",
            "lr",
            "ema",
            "pool",
            "objective",
            "fast_train",
            "refresh_norm",
        ],
    )
    b.figure("val_psnr")
    b.add("table", speed_table(s.all))
    b.analysis("C.iv")


def add_flags(b, s):
    """Add the appendix, the full table of flags."""
    if not with_settings(s.all):
        return
    b.add("h2", "Appendix: all flags")
    differs, equal = settings_tables(s.all)
    if len(differs) > 1:
        b.add("p", "What differs between the runs:")
        for part in split_columns(differs, keep=1):
            b.add("table", part)
    b.add(
        "p",
        "What is equal in all runs:"
        if len(with_settings(s.all)) > 1
        else f"Settings of {with_settings(s.all)[0].label}:",
    )
    b.add("pairs", equal)


def build_blocks(sections, figures, left_out, player_note):
    """Return the report as Blocks."""
    b = Blocks(figures, left_out)
    add_overview(b, sections)
    add_protocol(b, sections)
    add_tricks(b, sections)
    add_comparisons(b, sections)
    add_validation(b, sections, player_note)
    add_flags(b, sections)
    return b


# ---------------------------------------------------------------- report.md


def analysis_marks(key):
    return (
        f"<!-- your analysis {key}: what stands between these two lines is kept when the report "
        f"is made again -->",
        f"<!-- end of your analysis {key} -->",
    )


PLACEHOLDER = "*(write here)*"
ANALYSIS = re.compile(
    r"<!-- your analysis (\S+):[^\n]*-->\n(.*?)\n<!-- end of your analysis \1 -->", re.S
)


def kept_analysis(text):
    """Return {section: the analysis text that the user wrote} of an earlier report.md."""
    return {
        key: body.strip()
        for key, body in ANALYSIS.findall(text)
        if body.strip() not in ("", PLACEHOLDER)
    }


def signature(text):
    """Return report.md's last line, a checksum of all text but the analyses, to detect edits."""
    ours = "\n".join(line.rstrip() for line in ANALYSIS.sub("", text).splitlines() if line.strip())
    return f"<!-- made by make_report.py, {zlib.crc32(ours.encode()):08x} -->"


def changed_elsewhere(text):
    """Return whether a report.md was edited outside the analyses, which alone are kept."""
    body, _, last = text.rstrip().rpartition("\n")
    return last != signature(body)


def markdown_table(rows):
    escape = lambda cell: cell.replace("|", "\\|").replace("\n", " ")
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def markdown_block(kind, content, analysis):
    """Return one block as Markdown."""
    if kind in ("h2", "h2 same", "h3"):
        return f"{'#' * int(kind[1])} {content}"
    if kind in ("p", "missing"):
        return content
    if kind in ("table", "pairs"):
        return markdown_table(content)
    if kind == "figure":
        return f"![{content[1]}]({content[0]}.png)\n\n*{content[1]}*"
    if kind == "code":
        return "\n\n".join(
            f"`{f.name}` ({f.file}, line {f.line})\n\n```python\n{f.text}\n```" for f in content
        )
    if kind == "player":
        return "The frames themselves, with a slider: `report.html`."
    first, last = analysis_marks(content[0])
    text = analysis.get(content[0], PLACEHOLDER)
    return f"**Your text:** {content[1]}\n\n{first}\n\n{text}\n\n{last}"


def to_markdown(blocks, title, who, analysis):
    """Return the whole report as Markdown."""
    out = [
        f"# {title}",
        *([who] if who else []),
        "Made by `scripts/make_report.py`; figures lie beside this file, also as PDF. "
        "`report.html` is the same, with a player for the frames; print it as the PDF to submit. "
        "Markdown between the marks is rendered there.",
    ]
    text = "\n\n".join(
        [*out, *(markdown_block(kind, content, analysis) for kind, content in blocks)]
    )
    return f"{text}\n\n{signature(text)}\n"


def put_aside(path):
    """Rename a report that the user edited, and print its new name."""
    number = 1
    while (aside := path.with_name(f"report_edited_{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    print(f"{path} held text of yours: kept as {aside}")


# ---------------------------------------------------------------- command line


def build_parser():
    parser = Parser(prog="make_report.py", description="Write the report of training runs.")
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        default=[],
        help="a folder that Trainer.py wrote, for every section without runs of its own",
    )
    parser.add_argument(
        "--best", metavar="RUN", help="the run of B and C.iii (None: the one with the highest PSNR)"
    )
    parser.add_argument(
        "--kl", metavar="RUN", nargs="+", default=[], help="the runs of C.ii: the KL strategies"
    )
    parser.add_argument(
        "--tfr", metavar="RUN", nargs="+", default=[], help="the runs of C.i: teacher forcing"
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        required=True,
        help="folder for report.html, report.md and the figures",
    )
    parser.add_argument("--title", default=TITLE, help="the report's title")
    parser.add_argument("--student_id", metavar="ID", help="stands on top")
    parser.add_argument("--name", metavar="NAME", help="your name; stands on top")
    return parser


def identity(args):
    """Return (line on top of the report or None, name that a browser gives to the PDF)."""
    given = {
        flag: text
        for flag, text in (("student_id", args.student_id), ("name", args.name))
        if text is not None
    }
    parts = [name_part(text, f"--{flag}") for flag, text in given.items()]
    name = f"LAB4_{parts[0]}_{parts[1]}" if len(parts) == 2 else args.title
    who = " ".join(unicodedata.normalize("NFC", text).strip() for text in given.values())
    return who or None, name


def read_before(path):
    """Return the text of an earlier report.md, "" without one; UserError if unreadable."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read: {error}; nothing is replaced that may hold your text"
        ) from None


def main(argv=None):
    args = build_parser().parse_args(argv)
    who, name = identity(args)
    sections = load_sections(args)
    out = make_folder(args.out, "-o")
    page_path, markdown = out / "report.html", out / "report.md"
    before = read_before(markdown)

    figures, left_out = draw_figures(sections, out)
    budget = PAGE_BYTES - sum(len(png) * 4 // 3 for png in figures.values()) - 200_000
    shown = [r for r in sections.frames if r.frames is not None]
    sheets, layouts, note = sprite_sheets(shown, budget) if shown else ([], {}, None)
    blocks = build_blocks(sections, figures, left_out, note)
    analysis, render = kept_analysis(before), markdown_renderer(out)
    data = player_data(sections.frames, layouts, sheets)
    page = write_page(blocks, args.title, who, name, analysis, figures, data, render)
    if before and changed_elsewhere(before):
        put_aside(markdown)
    write(markdown, to_markdown(blocks, args.title, who, analysis))
    if page_path.is_file() and b"data-edited=" in page_path.read_bytes()[:2000]:
        put_aside(page_path)
    write(page_path, page)
    compared = [
        line
        for runs, quantity, what in [
            (sections.kl, "beta", "beta"),
            (sections.tfr, "tfr", "teacher forcing ratio"),
        ]
        for _, _, group in by_objective(runs)
        for line in warnings(group, quantity, what)
    ]
    for line in [*left_out.values(), *compared, *(r.problem for r in sections.frames if r.problem)]:
        print(line)
    if analysis and render is None:
        print(
            "report.html has your text as plain text; pip install markdown-it-py renders its "
            "Markdown"
        )
    print(f"{page_path} ({len(page) / 1e6:.1f} MB) and {markdown}")


if __name__ == "__main__":
    run(main)
