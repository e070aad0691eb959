"""Draw frames of a validation rollout: pose, prediction and ground truth in rows of one PNG.

python scripts/draw_frames.py ckpt/val_pred.gif -o rollout.png
python scripts/draw_frames.py ckpt/val_pred.gif -o rollout.png --frames 1 100 300 629 --scale 4
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from utils.cli import Parser, UserError, number, png_path, run  # noqa: E402
from plot_runs import new_figure  # noqa: E402
from report_frames import read_rollout  # noqa: E402
from utils.files import atomic  # noqa: E402


def draw(rollout, frames, scale, path):
    """Draw these frames of a rollout, numbered from 1, into a PNG.

    rollout: uint8 (frames, H, 3 * W, 3), pose | prediction | ground truth.
    """
    height, width = rollout.shape[1], rollout.shape[2] // 3
    inch = scale / 100  # of a pixel of the frame
    figure = new_figure(
        len(frames) * width * inch + 0.8, 3 * height * inch + 0.5, layout="constrained"
    )
    axes = figure.subplots(3, len(frames), squeeze=False)
    for column, frame in enumerate(frames):
        for row, name in enumerate(("pose", "prediction", "truth")):
            ax = axes[row, column]
            image = rollout[frame - 1, :, row * width:(row + 1) * width]  # (H, W, 3)
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(f"frame {frame}", fontsize=9)
            if column == 0:
                ax.set_ylabel(name, fontsize=9)
    with atomic(path) as aside:
        figure.savefig(aside, dpi=100, format="png")


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("gif", metavar="GIF", type=Path, help="val_pred.gif of a run")
    parser.add_argument("-o", required=True, type=png_path, metavar="PNG", help="image to write")
    parser.add_argument(
        "--frames", type=number(int, 1), nargs="+", default=[1, 100, 300, 629],
        help="frames to draw, from 1"
    )
    parser.add_argument(
        "--scale", type=number(int, 1, 20), default=4, help="size of a pixel of the frame"
    )
    args = parser.parse_args()
    rollout = read_rollout(args.gif)
    if rollout is None:
        raise UserError(f"{args.gif}: is not there; expected the val_pred.gif of a run")
    if max(args.frames) > len(rollout):
        raise UserError(f"--frames {max(args.frames)}: {args.gif} has {len(rollout)} frames")
    draw(rollout, args.frames, args.scale, args.o)


if __name__ == "__main__":
    run(main)
