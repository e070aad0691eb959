"""Check whether a submission.csv would be accepted, and score it where the true frames are given.

    python scripts/check_submission.py demo/test/submission.csv
    python scripts/check_submission.py demo/test/submission.csv --ground_truth FRAMES

FRAMES holds 0/*.png, 1/*.png, ... Exit status: 0 accepted, 2 not accepted (one line on stderr names
the first bad line and what was expected). The first frame of each sequence is given to everyone, so
it is checked but not scored. Checking needs NumPy and utils/ alone, scoring also PyTorch.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import metrics  # noqa: E402
from utils.cli import Parser, UserError, number, run  # noqa: E402
from utils.submission import check_submission, format_warning  # noqa: E402


def image_readers():
    """Return the functions that list and decode images, which need PyTorch and dataloader.py."""
    try:
        from dataloader import list_images
        from utils.frame_cache import decode
    except Exception as error:  # another project's dataloader.py may do anything
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--ground_truth: images can't be read ({problem}); expected PyTorch "
                        f"and this project's {ROOT / 'dataloader.py'}") from None
    return list_images, decode


def score(pixels, folder, sequences, frames, height, width):
    """Return the PSNR of every predicted frame, (sequences, frames - 1): not of the given one."""
    list_images, decode = image_readers()
    files = [list_images(Path(folder) / str(sequence)) for sequence in range(sequences)]
    for names in files:
        if len(names) != frames:
            raise UserError(f"{names[0].parent}: holds {len(names)} images; "
                            f"expected {frames}, one a frame")
    shape = sequences, frames, 3 * height * width
    truth = decode(sum(files, []), height, width, desc="reading the true frames")
    truth, predicted = (values.reshape(shape)[:, 1:] for values in (truth, pixels))
    # frame by frame: all at once in float64 would take 300 MB
    mse = np.array([[np.mean(((p - t) / 255) ** 2) for p, t in zip(*pair)]
                     for pair in zip(predicted.astype(np.int16), truth)])
    return metrics.psnr(mse)


def build_parser():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("csv", metavar="CSV", help="the submission")
    parser.add_argument("--ground_truth", metavar="DIR",
                        help="folder with the true frames, DIR/{0..4}/*.png, to score against")
    parser.add_argument("--sequences", type=number(int, 1, 10_000), default=5,
                        help="test sequences")
    parser.add_argument("--frames", type=number(int, 2, 10_000), default=630,
                        help="frames of each, the given first one included")
    parser.add_argument("--frame_H", type=number(int, 1, 4096), default=32,
                        help="height of a frame")
    parser.add_argument("--frame_W", type=number(int, 1, 4096), default=64, help="width of a frame")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    values = 3 * args.frame_H * args.frame_W
    pixels = check_submission(args.csv, args.sequences, args.frames, values)
    if args.ground_truth:
        psnr = score(pixels, args.ground_truth, args.sequences, args.frames, args.frame_H,
                     args.frame_W)
    print(f"accepted: {args.csv}: {len(pixels):,} rows of {values:,} values "
          f"({args.sequences} sequences of {args.frames} frames)")
    warning = format_warning(args.sequences, args.frames, (3, args.frame_H, args.frame_W))
    if warning:
        print(f"{args.csv}: {warning}")
    if args.ground_truth:
        print(f"PSNR in dB over frames 1 to {args.frames - 1} (frame 0 is given, so not scored):")
        print(f"{'sequence':>8} {'mean':>8} {'min':>8} {'last':>8}")
        for sequence, row in enumerate(psnr):
            print(f"{sequence:>8} {row.mean():8.3f} {row.min():8.3f} {row[-1]:8.3f}")
        print(f"{'all':>8} {psnr.mean():8.3f} {psnr.min():8.3f} {psnr[:, -1].mean():8.3f}   "
              f"(last: mean over sequences)")


if __name__ == "__main__":
    run(main)
