"""The Tester: CSV, GIFs, both forms of the command, and rollouts that go wrong."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, in_process
from PIL import Image, ImageSequence

import Tester
from dataloader import Dataset_Dance, frame_transform
from utils import files
from utils.submission import check_submission, csv_rows, format_warning, write_submission

SEQUENCES, FRAMES, H, W = 5, 20, 16, 32
CPU = ["--device", "cpu", "--precision", "fp32"]


def roll_out(checkpoint, out, *flags):
    """The exit status of Tester.py on a checkpoint, with its output in `out`."""
    words = "--ckpt_path", checkpoint, "--save_root", out, *CPU, *flags
    return in_process(Tester.main, *words)


@pytest.fixture(scope="module")
def tested(tiny_data, tiny_run, tmp_path_factory):
    """The assignment's form of the command, with the GIFs of the poses too."""
    out = tmp_path_factory.mktemp("tested") / "new" / "out"
    assert (
        in_process(
            Tester.main,
            "--DR",
            tiny_data,
            "--save_root",
            out,
            "--ckpt_path",
            tiny_run / "best.ckpt",
            "--make_gif",
            *CPU,
        )
        == 0
    )
    return out


@pytest.fixture
def changed(tiny_run, tmp_path):
    """changed(key, value, ...): the checkpoint with one weight filled, other entries set."""

    def change(key=None, value=None, **fields):
        content = torch.load(tiny_run / "best.ckpt", weights_only=True)
        if key:
            content["state_dict"][key] = torch.full_like(content["state_dict"][key], value)
        path = tmp_path / "changed" / "changed.ckpt"
        path.parent.mkdir(exist_ok=True)
        torch.save({**content, **fields}, path)
        return path
    return change


def milliseconds(path, size):
    with Image.open(path) as gif:
        assert gif.format == "GIF" and gif.size == size
        return sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif))


# ---------------------------------------------------------------- the CSV

def test_the_bytes_of_a_submission(tmp_path):
    """Channel first, whole numbers rint(255 x), as pandas' to_csv(index_label="id") writes it."""
    first = torch.tensor([0, 1, 0.5, 0.1, 0.001, 0.999]).view(1, 3, 1, 2)
    second = torch.arange(6).div(255).view(1, 3, 1, 2)
    path = tmp_path / "submission.csv"
    write_submission(path, csv_rows(torch.cat([first, second])) + csv_rows(first), 6)
    assert (
        path.read_bytes()
        == b"id,0,1,2,3,4,5\n0,0,255,128,26,0,255\n1,0,1,2,3,4,5\n2,0,255,128,26,0,255\n"
    )
    assert check_submission(path, 3, 1, 6).tolist() == [
        [0, 255, 128, 26, 0, 255],
        [0, 1, 2, 3, 4, 5],
        [0, 255, 128, 26, 0, 255],
    ]


def test_channels_come_first():
    frame = torch.arange(12).div(255).view(1, 3, 2, 2)
    assert csv_rows(frame) == ["0,1,2,3,4,5,6,7,8,9,10,11"]
    assert [
        int(word)
        for word in csv_rows(torch.arange(256).div(255).repeat(3).view(1, 3, 16, 16))[0].split(",")
    ] == [*range(256)] * 3


def test_the_files_of_a_run(tested, tiny_data):
    assert sorted(os.listdir(tested)) == sorted(
        [
            "submission.csv",
            *(f"{kind}_seq{i}.gif" for kind in ("pred", "pose_pred") for i in range(5)),
        ]
    )
    text = (tested / "submission.csv").read_bytes()
    rows = text.decode("ascii").split("\n")
    assert rows.pop() == "" and b"\r" not in text and len(rows) == 1 + SEQUENCES * FRAMES
    assert rows[0] == ",".join(["id", *map(str, range(3 * H * W))])
    cells = [row.split(",") for row in rows[1:]]
    assert [row[0] for row in cells] == [str(i) for i in range(SEQUENCES * FRAMES)]
    assert all(
        len(row) == 1 + 3 * H * W
        and all(re.fullmatch("0|[1-9][0-9]{0,2}", cell) and int(cell) < 256 for cell in row[1:])
        for row in cells
    )
    assert check_submission(tested / "submission.csv", SEQUENCES, FRAMES, 3 * H * W).shape == (
        SEQUENCES * FRAMES,
        3 * H * W,
    )
    for i, (first, _) in enumerate(
        Dataset_Dance(tiny_data, frame_transform(H, W), "test")
    ):  # the given frame is the first row
        assert ",".join(cells[i * FRAMES][1:]) == csv_rows(first)[0]


def test_the_rows_are_the_rollout(tested, tiny_run, tiny_data):
    args = Tester.build_parser().parse_args(
        ["--DR", str(tiny_data), "--ckpt_path", str(tiny_run / "best.ckpt"), *TINY]
    )
    model = Tester.Test_model(args)
    model.load_checkpoint()
    found = check_submission(tested / "submission.csv", SEQUENCES, FRAMES, 3 * H * W).reshape(
        SEQUENCES, FRAMES, 3, H, W
    )
    for i, (img, label) in enumerate(model.val_dataloader()):
        assert img.shape == (1, 1, 3, H, W) and label.shape == (1, FRAMES, 3, H, W)
        frames, rows = model.val_one_step(img, label, i)
        assert (
            frames.shape == (1, FRAMES, 3, H, W)
            and frames.min() >= 0
            and frames.max() <= 1
            and len(rows[0]) == FRAMES
        )
        # convolutions of one image and of several round in their own ways: a value on the edge tips
        apart = np.abs(found[i] - np.rint(255 * frames[0].double().numpy()))
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


# ---------------------------------------------------------------- GIFs

def test_gifs(tested):
    for i in range(SEQUENCES):
        assert milliseconds(tested / f"pred_seq{i}.gif", (W, H)) == FRAMES * 20
        assert milliseconds(tested / f"pose_pred_seq{i}.gif", (2 * W, H)) == FRAMES * 20
    with Image.open(tested / "pred_seq0.gif") as gif:
        assert gif.info["loop"] == 0


def test_a_still_gif_lasts_as_long(changed, tiny_data, tmp_path):
    """A generator that always draws the same: Pillow merges equal neighbours."""
    path = changed("Generator.7.weight", 0.0)
    assert roll_out(path, tmp_path / "out", "--no_sanity") == 0
    with Image.open(tmp_path / "out" / "pred_seq0.gif") as gif:
        assert gif.n_frames < FRAMES
    assert milliseconds(tmp_path / "out" / "pred_seq0.gif", (W, H)) == FRAMES * 20


# ---------------------------------------------------------------- the two forms of the command

def test_everything_but_the_checkpoint_can_be_left_out(tested, tiny_run, tmp_path, capsys):
    """Sizes, frame shape, number of frames and data path are those of the checkpoint."""
    shutil.copy(tiny_run / "best.ckpt", tmp_path / "copy.ckpt")
    assert in_process(Tester.main, "--ckpt_path", tmp_path / "copy.ckpt", *CPU) == 0
    assert (tmp_path / "test" / "submission.csv").read_bytes() == (
        tested / "submission.csv"
    ).read_bytes()
    assert sorted(os.listdir(tmp_path / "test")) == [
        "pred_seq0.gif",
        "pred_seq1.gif",
        "pred_seq2.gif",
        "pred_seq3.gif",
        "pred_seq4.gif",
        "submission.csv",
    ]
    out = capsys.readouterr().out
    assert str(tmp_path / "test" / "submission.csv") in out and "100 rows" in out
    assert (tmp_path / "test" / "pred_seq0.gif").read_bytes() == (
        tested / "pred_seq0.gif"
    ).read_bytes()


def test_data_that_the_checkpoint_names_and_that_are_not_here(tiny_run, tmp_path, capfd):
    checkpoint = torch.load(tiny_run / "best.ckpt", weights_only=True)
    checkpoint["args"]["DR"] = "gone"
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    assert in_process(Tester.main, "--ckpt_path", tmp_path / "moved.ckpt", *CPU) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: --DR gone") and "moved.ckpt" in err


def test_the_templates_dataset(tiny_data):
    first, labels = Tester.Dataset_Dance(tiny_data, frame_transform(H, W), video_len=FRAMES)[0]
    assert first.shape == (1, 3, H, W) and labels.shape == (FRAMES, 3, H, W)


def test_a_flag_beats_the_checkpoint(tiny_run, tiny_data, tmp_path):
    flags = ["--ckpt_path", tiny_run / "best.ckpt", "--save_root", tmp_path / "out", *CPU]
    assert in_process(Tester.main, *flags, "--frame_H", 8, "--frame_W", 24) == 0
    assert milliseconds(tmp_path / "out" / "pred_seq0.gif", (24, 8)) == FRAMES * 20
    first = (tmp_path / "out" / "submission.csv").read_bytes()
    assert in_process(Tester.main, *flags, "--frame_H", 8, "--frame_W", 24, "--seed", 1) == 0
    assert (tmp_path / "out" / "submission.csv").read_bytes() != first  # written over
    assert (
        in_process(
            Tester.main, *flags, "--frame_H", 8, "--frame_W", 24, "--z", "zero", "--rollouts", 2
        )
        == 0
    )


def test_flags_of_training_change_nothing(tested, tiny_run, tiny_data, tmp_path):
    flags = [
        "--num_epoch",
        3,
        "--lr",
        0.5,
        "--batch_size",
        7,
        "--tfr",
        0.5,
        "--kl_anneal_type",
        "Monotonic",
        "--fast_train",
        "--recipe",
        "template",
        "--test",
        "--train_vi_len",
        9,
        "--optim",
        "Adam",
        "--num_workers",
        0,
    ]
    assert (
        in_process(
            Tester.main,
            "--DR",
            tiny_data,
            "--save_root",
            tmp_path,
            "--ckpt_path",
            tiny_run / "best.ckpt",
            *flags,
            *CPU,
        )
        == 0
    )
    assert (tmp_path / "submission.csv").read_bytes() == (tested / "submission.csv").read_bytes()


def test_another_number_of_sequences(tiny_data, tiny_run, tmp_path, tested):
    for folder in ("test_img", "test_label"):
        for new, old in enumerate((0, 3)):
            shutil.copytree(
                tiny_data / "test" / folder / str(old),
                tmp_path / "data" / "test" / folder / str(new),
            )
    flags = [
        "--DR",
        tmp_path / "data",
        "--save_root",
        tmp_path / "out",
        "--ckpt_path",
        tiny_run / "best.ckpt",
        *CPU,
    ]
    assert in_process(Tester.main, *flags) == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "pred_seq0.gif",
        "pred_seq1.gif",
        "submission.csv",
    ]
    found = check_submission(tmp_path / "out" / "submission.csv", 2, FRAMES, 3 * H * W)
    expected = check_submission(tested / "submission.csv", 5, FRAMES, 3 * H * W)
    np.testing.assert_array_equal(
        found, np.concatenate([expected[:FRAMES], expected[3 * FRAMES : 4 * FRAMES]])
    )


# ---------------------------------------------------------------- what goes wrong

@pytest.mark.parametrize(
    "key, value",
    [
        ("Generator.7.bias", float("nan")),
        ("frame_transformation.6.weight", float("inf")),
        ("Decoder_Fusion.5.bias", 1e38),
    ],
)
def test_a_rollout_that_is_not_finite_writes_nothing(key, value, changed, tmp_path, capfd):
    assert roll_out(changed(key, value), tmp_path / "out") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "|" not in line]
    assert line.startswith("error: ") and "sequence 0" in line and "frame 1 " in line
    assert not (tmp_path / "out").exists()


def test_the_first_infinite_sequence_and_frame_are_named(
    tiny_run, tiny_data, tmp_path, capfd, monkeypatch
):
    true, calls = Tester.Test_model.next_frame, []

    def next_frame(self, *inputs):
        calls.append(None)
        frame = true(self, *inputs)
        if len(calls) == 7:
            frame[3, 0, 0, 0] = float("nan")
        return frame

    monkeypatch.setattr(Tester.Test_model, "next_frame", next_frame)
    assert roll_out(tiny_run / "best.ckpt", tmp_path / "out") == 2
    assert "sequence 3: frame 7 " in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_validated_in_another_way_is_reported(tiny_run, tmp_path, capsys):
    checkpoint = torch.load(tiny_run / "best.ckpt", weights_only=True)
    checkpoint["args"]["z"] = "zero"
    torch.save(checkpoint, tmp_path / "zero.ckpt")
    for flags, said in (((), True), (("--z", "zero"), False)):
        assert roll_out(tmp_path / "zero.ckpt", tmp_path / "out", *flags) == 0
        assert ("--z prior: the run was validated with --z zero" in capsys.readouterr().out) == said


def test_another_format_than_the_competitions_is_reported(tiny_run, tmp_path, capsys):
    flags = ["--ckpt_path", tiny_run / "best.ckpt", "--save_root", tmp_path / "out", *CPU]
    assert in_process(Tester.main, *flags) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "competition" in line]
    assert line.endswith(
        "not the competition's format: 5 sequences of 20 frames of 16x32, 100 rows of 1,537 "
        "columns; the competition expects 5 sequences of 630 frames of 32x64, 3,150 rows of 6,145 "
        "columns")


@pytest.mark.parametrize("shape, allowed", [
    ((5, 630, (3, 32, 64)), True), ((4, 630, (3, 32, 64)), False), ((5, 629, (3, 32, 64)), False),
    ((5, 630, (3, 64, 32)), False), ((5, 630, (3, 32, 32)), False)])
def test_the_format_of_the_competition(shape, allowed):
    assert (format_warning(*shape) is None) == allowed
    assert (format_warning(*shape[:2], torch.Size(shape[2])) is None) == allowed


def test_no_sanity_skips_the_check(tiny_run, tmp_path, monkeypatch):
    def checked(*_):
        raise AssertionError("was checked")

    monkeypatch.setattr(Tester, "check_submission", checked)
    flags = ["--ckpt_path", tiny_run / "best.ckpt", "--save_root", tmp_path / "out", *CPU]
    assert in_process(Tester.main, *flags, "--no_sanity") == 0
    with pytest.raises(AssertionError, match="was checked"):
        Tester.main([str(flag) for flag in flags])


def test_the_check_notices_other_frames(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Tester, "csv_rows", lambda frames: [",".join(["0"] * (3 * H * W))] * len(frames)
    )
    with pytest.raises(RuntimeError, match="submission.csv"):
        Tester.main(
            ["--ckpt_path", str(tiny_run / "best.ckpt"), "--save_root", str(tmp_path / "out"), *CPU]
        )


def test_an_output_activation_of_the_command_holds_for_every_checkpoint(tiny_run, tmp_path):
    """A checkpoint given twice predicts what it predicts alone."""
    for count in (1, 2):
        words = [*[tiny_run / "best.ckpt"] * count, "--output", "sigmoid", "--z", "zero"]
        assert roll_out(*words[:1], tmp_path / str(count), "--ckpt_path", *words) == 0
    alone, both = (check_submission(tmp_path / name / "submission.csv", SEQUENCES, FRAMES,
                                    3 * H * W) for name in "12")
    assert np.array_equal(alone, both) and alone.min() > 0  # a sigmoid is never 0


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_behind(number, status, tiny_run, tmp_path, monkeypatch):
    def interrupted(path, rows, values):
        with files.atomic(path) as aside:
            aside.write_text("half")
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Tester, "write_submission", interrupted)
    before = signal.getsignal(number)
    assert roll_out(tiny_run / "best.ckpt", tmp_path / "out") == status
    assert signal.getsignal(number) is before
    assert all(re.fullmatch(r"pred_seq\d.gif", name) for name in os.listdir(tmp_path / "out"))
