"""Read the frames of val_pred.gif, draw the best and worst, lay out the player's sheets.

Not a program; make_report.py and draw_frames.py use it.
"""

import base64
import io
import math

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image, ImageSequence

from plot_runs import SETTINGS, STYLES, new_figure
from utils.cli import UserError

TICK = 40  # milliseconds a frame of val_pred.gif
SCALE = 4  # how much larger than they are frames are shown
WEBP_SIDE = 16383  # pixels at most


def read_rollout(path):
    """Return the frames of val_pred.gif, uint8 (ticks, H, 3 * W, 3); None where there is no GIF.

    Pillow writes equal neighbours as one frame that lasts longer; such a frame is repeated for each
    tick. UserError for a file that is no GIF of three images side by side.
    """
    if not path.is_file():
        return None
    frames = []
    try:
        with Image.open(path) as gif:
            for frame in ImageSequence.Iterator(gif):
                image = np.asarray(frame.convert("RGB"))
                frames += [image] * max(1, round(frame.info.get("duration", TICK) / TICK))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a GIF: {error}") from None
    frames = np.stack(frames)
    if frames.shape[2] % 3:
        raise UserError(
            f"{path}: is {frames.shape[2]} pixels wide; expected three images side by side"
        )
    return frames


def add_frames(run):
    """Set a run's frames (ticks, H, 3 * W, 3), the number of the first, and any problem."""
    run.frames = read_rollout(run.path / "val_pred.gif")
    run.first, run.problem = 1, None
    if run.frames is None:
        run.problem = f"{run.label} has no val_pred.gif: its frames are left out."
    elif run.psnr is not None:
        # 629 frames 1..629, or 630 with the given frame 0; else it is another rollout's GIF
        run.first = int(run.psnr["frame"][-1]) - len(run.frames) + 1
        if run.first not in (0, 1):
            run.problem = (
                f"{run.label}: val_pred.gif lasts {len(run.frames)} frames and psnr_per_frame.csv "
                f"ends with frame {run.psnr['frame'][-1]:g}, so they are not of the same rollout; "
                "its frames are left out."
            )
            run.frames = None


def best_and_worst(run, count=3):
    """Return (best, worst), indices into run.psnr; each skips neighbours, which look the same."""
    order = [i for i in np.argsort(run.psnr["psnr"]) if np.isfinite(run.psnr["psnr"][i])]
    apart = max(1, len(order) // 20)

    def pick(candidates):
        taken = []
        for i in candidates:
            if len(taken) < count and all(abs(i - j) >= apart for j in taken):
                taken.append(int(i))
        return taken

    return pick(order[::-1]), pick(order)


def draw_column(fig, image, rectangles):
    """Draw a frame's pose, prediction and ground truth, each in (left, bottom, width, height)."""
    width = image.shape[1] // 3
    for row, rectangle in enumerate(rectangles):
        ax = fig.add_axes(rectangle)
        ax.imshow(image[:, row * width : (row + 1) * width], interpolation="nearest", aspect="auto")
        ax.set_axis_off()
        ax.add_artist(
            Rectangle(
                (0, 0), 1, 1, transform=ax.transAxes, fill=False, edgecolor="#b0b0b0", linewidth=0.6
            )
        )


def frames_figure(run):
    """Draw best and worst frames of a run: pose, prediction, ground truth under each other."""
    best, worst = best_and_worst(run)
    height, width = run.frames.shape[1], run.frames.shape[2] // 3
    columns, left, top, gap = len(best) + len(worst), 0.85, 0.42, 0.04  # inches
    cell = (9 - left) / max(columns, 4)
    tall = cell * height / width
    size = left + columns * cell, top + 3 * (tall + gap)
    with matplotlib.rc_context(SETTINGS):
        fig = new_figure(*size)
        for column, i in enumerate(best + worst):
            number = int(run.psnr["frame"][i])
            kind = "best" if column < len(best) else "worst"
            fig.text(
                (left + (column + 0.5) * cell) / size[0],
                1 - 0.08 / size[1],
                ha="center",
                va="top",
                s=f"{kind}: frame {number}\n{run.psnr['psnr'][i]:.2f} dB",
                fontsize=7.5,
            )
            bottoms = [size[1] - top - (row + 1) * tall - row * gap for row in range(3)]
            draw_column(
                fig,
                run.frames[number - run.first],
                [
                    (
                        (left + column * cell) / size[0],
                        y / size[1],
                        (cell - gap) / size[0],
                        tall / size[1],
                    )
                    for y in bottoms
                ],
            )
        for row, name in enumerate(("Pose", "Prediction", "Ground truth")):
            y = size[1] - top - (row + 0.5) * tall - row * gap
            fig.text(0.02 / size[0], y / size[1], name, fontsize=8, va="center")
    return fig


# ---------------------------------------------------------------- the player


def encode(images, kind, **options):
    """Return images as data URIs."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        text = base64.b64encode(buffer.getvalue()).decode()
        encoded.append(f"data:image/{kind.lower()};base64,{text}")
    return encoded


def lay_out(runs):
    """Return the distinct sheets of frames, {(shape, bytes): number}, and {run name: layout}."""
    panels, layouts = {}, {}
    for r in runs:
        ticks, height, triple = r.frames.shape[:3]
        width = triple // 3
        columns = max(1, min(math.ceil(math.sqrt(ticks)), WEBP_SIDE // width))
        if math.ceil(ticks / columns) * height > WEBP_SIDE:
            continue  # large frames: their GIF is in the run's folder
        layout = {
            "width": width, "height": height, "columns": columns, "ticks": ticks,
            "first": r.first, "sheets": [],
        }
        for part in range(3):
            sheet = np.zeros((math.ceil(ticks / columns) * height, columns * width, 3), np.uint8)
            for t in range(ticks):
                y, x = t // columns * height, t % columns * width
                sheet[y : y + height, x : x + width] = r.frames[t][
                    :, part * width : (part + 1) * width
                ]
            layout["sheets"].append(panels.setdefault((sheet.shape, sheet.tobytes()), len(panels)))
        layouts[r.name] = layout
    return panels, layouts


def sprite_sheets(runs, budget):
    """Return (sheets as data URIs, {run name: layout}, a line about lossy storage or None)."""
    panels, layouts = lay_out(runs)
    images = [
        Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape)) for shape, data in panels
    ]
    exact = encode(images, "WEBP", lossless=True, quality=40, method=3)
    note, sheets = None, exact
    for quality in (95, 90, 80, 60):
        if sum(map(len, sheets)) <= budget:
            break
        # JPEG, as lossy WebP always halves the resolution of colour, which shows on frames this
        # small
        lossy = encode(images, "JPEG", quality=quality, subsampling=0, optimize=True)
        sheets = [a if len(a) < 1.5 * len(b) else b for a, b in zip(exact, lossy)]
        note = (
            f"To keep this page small, the player's frames are stored with some loss (JPEG, "
            f"quality {quality}); "
            "val_pred.gif has them as they were."
        )
    return sheets, layouts, note


def player_data(runs, layouts, sheets):
    """Return the script's data: sheets, and each run's layout, colour and {frame: finite PSNR}."""
    entries = []
    for i, r in enumerate(runs):
        if r.name in layouts:
            psnr = None
            if r.psnr is not None:
                known = zip(r.psnr["frame"], r.psnr["psnr"])
                psnr = {str(int(f)): round(float(p), 2) for f, p in known if math.isfinite(p)}
            entries.append(
                dict(layouts[r.name], name=r.label, psnr=psnr, colour=STYLES[i % len(STYLES)][0])
            )
    return {"tick": TICK, "scale": SCALE, "sheets": sheets, "runs": entries}
