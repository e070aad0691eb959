"""Roll out the test sequences with a trained checkpoint; write submission.csv and GIFs.

    # output in ckpt/test/
    python Tester.py --ckpt_path ckpt/best.ckpt
    # the assignment's command
    python Tester.py --DR data --save_root out --ckpt_path ckpt/best.ckpt

Sizes, frame shape, sequence length, output activation and data path come from the checkpoint where
no flag is given.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils import cli  # before PyTorch: see utils/__init__.py

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils import options
import dataloader
from utils.cli import UserError, progress
from utils.frame_cache import cache_folder, cached, to_float
from utils.hardware import check_torch
from utils.files import check_save_root, make_folder, output_folder
from utils.submission import check_submission, csv_rows, format_warning, write_submission
from Trainer import VAE_Model
from utils.checkpoint import adopt_settings

GIF_TICK = 20  # milliseconds a frame, the template's
# flags that a checkpoint sets where the command line does not
FROM_CHECKPOINT = {"DR", "F_dim", "L_dim", "N_dim", "D_out_dim", "frame_H", "frame_W", "output",
                   "val_vi_len"}


# ---------------------------------------------------------------- the model that is tested

class Dataset_Dance(dataloader.Dataset_Dance):
    """Give the test sequences by default, like the template's class of this name in Tester.py."""

    def __init__(self, root, transform, mode="test", video_len=7, partial=1.0):
        super().__init__(root, transform, mode, video_len, partial)


class Test_model(VAE_Model):
    """Roll out the test sequences in `eval`, and write submission.csv and GIFs."""

    @staticmethod
    def flags():
        """Return the parser whose defaults complete `args`."""
        return build_parser()

    def val_dataloader(self):
        """Return a loader that gives one test sequence at a time.

        A sequence is a first frame (1, 1, 3, H, W) and poses (1, val_vi_len, 3, H, W), float32 in
        [0, 1]. UserError for a sequence of another length.
        """
        args = self.args
        dataset = Dataset_Dance(args.DR, None, video_len=args.val_vi_len)
        for _, labels in dataset.sequences:
            if len(labels) != args.val_vi_len:
                raise UserError(f"{labels[0].parent}: holds {len(labels)} poses; "
                                f"expected {args.val_vi_len} (--val_vi_len)")
        # no loader processes: all poses exceed the shared memory of a small container
        paths = [path for first, labels in dataset.sequences for path in (first, *labels)]
        folder = None if args.no_cache else cache_folder(args.DR, args.cache_dir)
        images = cached(paths, args.frame_H, args.frame_W, folder, args.num_workers,
                        "decoding test poses")
        images = to_float(torch.from_numpy(images))
        sequences = images.unflatten(0, (len(dataset), 1 + args.val_vi_len))
        return DataLoader([(sequence[:1], sequence[1:]) for sequence in sequences], 1)

    def val_one_step(self, img, label, idx=0):
        """Roll out a batch of sequences from img (S, 1, 3, H, W) and label (S, T, 3, H, W).

        idx: number of the first sequence, an argument of the template's. Returns the frames
        (S, T, 3, H, W) in [0, 1], the given first frame included, and the CSV's rows of each
        sequence.
        """
        first = img[:, 0].clamp(0, 1)
        rows = [[] for _ in first]
        with ThreadPoolExecutor(1) as writer:  # numbers become text while the network computes
            def write(frames):
                for own, sequence in zip(rows, frames):
                    own.extend(csv_rows(sequence))

            jobs = [writer.submit(write, first[:, None])]

            def look(done, frames):
                jobs.append(writer.submit(write, frames))
                self.tqdm_bar("test", self.session.bar, done, advance=frames.shape[1])

            generated = self.rollout(first, label, look)
        for job in jobs:
            job.result()
        return torch.cat([first[:, None].cpu(), generated], 1), rows

    def tqdm_bar(self, mode, pbar, loss, lr=0.0, advance=1):
        """Advance the bar of the test rollout."""
        if pbar is not None:
            pbar.update(advance)

    def eval(self):
        """Roll out all test sequences together; write submission.csv and the GIFs.

        Returns the frames (S, T, 3, H, W) in [0, 1]. UserError for frames that are not finite, and
        for a folder that can't be written.
        """
        args = self.args
        options.require(args, "save_root")
        loader = self.val_dataloader()
        img, label = (torch.cat(parts) for parts in zip(*loader))
        with progress(total=args.val_vi_len - 1, desc=f"testing {len(img)} sequences",
                      unit="frame") as self.session.bar:
            frames, rows = self.val_one_step(img, label)

        root = make_folder(args.save_root)
        csv, values = root / "submission.csv", frames[0, 0].numel()
        with ThreadPoolExecutor(2) as writers:
            jobs = [writers.submit(self.make_gif, sequence, root / f"pred_seq{i}.gif")
                    for i, sequence in enumerate(frames)]
            if args.make_gif:
                jobs += [writers.submit(self.make_gif, torch.cat([poses, sequence], 3),
                                        root / f"pose_pred_seq{i}.gif")
                         for i, (poses, sequence) in enumerate(zip(label, frames))]
            write_submission(csv, [row for sequence in rows for row in sequence], values)
        for job in jobs:
            job.result()
        if not args.no_sanity:
            written = check_submission(csv, len(frames), args.val_vi_len, values)
            generated = np.rint(255 * frames.double().numpy())
            if not np.array_equal(written, generated.reshape(written.shape)):
                raise RuntimeError(f"{csv} does not hold the frames that were generated")
        return frames

    def make_gif(self, images_list, img_name, duration=GIF_TICK):
        """Write frames (3, H, W) in [0, 1] as a GIF, `duration` milliseconds each."""
        super().make_gif(images_list, img_name, duration)


# ---------------------------------------------------------------- the command line

def build_parser():
    """Return the parser of Tester.py."""
    parser = options.build_parser(
        "Tester.py", "Roll out the test sequences and write the submission.")
    parser.add_argument("--no_sanity", action="store_true",
                        help="skip the check of submission.csv after writing it")
    parser.add_argument("--make_gif", action="store_true",
                        help="also write pose_pred_seq{i}.gif, the poses beside the frames")
    return parser


def main(argv=None):
    """Run the command of an argument list; of sys.argv where there is none."""
    check_torch()
    args = build_parser().parse_args(argv)
    options.require(args, "ckpt_path")
    settings = adopt_settings(args, VAE_Model.flags(), FROM_CHECKPOINT)
    for name in ("z", "rollouts"):  # not set by the checkpoint, yet its score depends on them
        own = getattr(args, name)
        if settings.get(name, own) != own:
            cli.say(f"--{name} {own}: the run was validated with --{name} {settings[name]}")
    options.require(args, "DR")
    if args.save_root is None:
        args.save_root = str(Path(options.as_list(args.ckpt_path)[0]).parent / "test")
    check_save_root(args.save_root)
    names = "submission.csv", "pred_seq*.gif", "pose_pred_seq*.gif"
    args.save_root = str(output_folder(args.save_root, names))
    with cli.catching_signals(cli.stop):
        model = Test_model(args)
        model.load_checkpoint()
        cli.say(f"{args.device}, {model.picked_precision[1]}")
        frames = model.eval()
    csv = Path(args.save_root) / "submission.csv"
    cli.say(f"{csv}: {frames.shape[0] * frames.shape[1]} rows; "
            f"pred_seq0.gif to pred_seq{len(frames) - 1}.gif beside it")
    warning = format_warning(*frames.shape[:2], frames.shape[2:])
    if warning:
        cli.say(f"{csv}: {warning}")


if __name__ == "__main__":
    cli.run(main)
