"""scripts/check_submission.py: what it accepts, the line it names, and its score."""

import contextlib
import io
import shutil
from types import SimpleNamespace

import check_submission
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor

from conftest import ROOT, in_process, run_cli

SEQUENCES, FRAMES, HEIGHT, WIDTH = 2, 4, 4, 6
VALUES = 3 * HEIGHT * WIDTH
SHAPE = [
    f"--sequences={SEQUENCES}", f"--frames={FRAMES}", f"--frame_H={HEIGHT}", f"--frame_W={WIDTH}"
]


def check(path, *flags):
    """The command in this process, which spares the seconds that importing torch takes."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = in_process(check_submission.main, path, *SHAPE, *flags)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (SEQUENCES * FRAMES, VALUES))


def lines_of(pixels):
    return ["id," + ",".join(map(str, range(VALUES)))] + [
        f"{i}," + ",".join(map(str, row)) for i, row in enumerate(pixels.tolist())
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last_end", [True, False])
def test_accepts(tmp_path, pixels, end, last_end):
    path = tmp_path / "submission.csv"
    path.write_bytes((end.join(lines_of(pixels)) + (end if last_end else "")).encode())
    done = check(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("accepted") and "8 rows" in done.stdout


def test_returns_the_pixels(tmp_path, pixels):
    from check_submission import check_submission

    path = tmp_path / "submission.csv"
    path.write_text("\n".join(lines_of(pixels)) + "\n")
    found = check_submission(path, SEQUENCES, FRAMES, VALUES)
    assert found.dtype == np.uint8 and np.array_equal(found, pixels)


def with_field(line, column, value):
    def change(lines):
        fields = lines[line - 1].split(",")
        fields[column] = value
        lines[line - 1] = ",".join(fields)

    return change


BAD = {
    "header": (with_field(1, 0, "ID"), 1, "header has 'ID' as column 1"),
    "short header": (
        lambda lines: lines.__setitem__(0, lines[0].rsplit(",", 1)[0]),
        1, f"header has {VALUES} columns"
    ),
    "no header": (lambda lines: lines.pop(0), 1, "header"),
    "swapped rows": (
        lambda lines: lines.__setitem__(slice(2, 4), lines[3:1:-1]), 3, "id is '2', expected 1"
    ),
    "id with zeros": (with_field(4, 0, "02"), 4, "expected 2"),
    "missing row": (lambda lines: lines.pop(), 9, "ends after 7 rows, expected 8"),
    "empty": (lambda lines: lines.clear(), 1, "header"),
    "extra row": (lambda lines: lines.append("8" + lines[-1][1:]), 10, "more than 8 rows"),
    "blank line inside": (lambda lines: lines.insert(5, ""), 6, "blank"),
    "blank line at the end": (lambda lines: lines.append(""), 10, "blank"),
    "too many columns": (
        lambda lines: lines.__setitem__(3, lines[3] + ",1"),
        4, f"{VALUES + 2} columns, expected {VALUES + 1}"
    ),
    "far too many columns": (lambda lines: lines.__setitem__(3, lines[3] * 50), 4, "longer"),
    "too few columns": (
        lambda lines: lines.__setitem__(3, lines[3].rsplit(",", 1)[0]), 4, f"{VALUES} columns"
    ),
    "one column": (lambda lines: lines.__setitem__(3, "2,7"), 4, "2 columns"),
    "id alone": (lambda lines: lines.__setitem__(3, "2"), 4, "1 columns"),
    "float": (with_field(5, 3, "12.0"), 5, "column 2 is '12.0'"),
    "too large": (with_field(5, 3, "256"), 5, "column 2 is '256'"),
    "negative": (with_field(5, 3, "-1"), 5, "column 2 is '-1'"),
    "nan": (with_field(5, VALUES, "nan"), 5, f"column {VALUES - 1} is 'nan'"),
    "nothing": (with_field(5, 1, ""), 5, "column 0 is ''"),
    "space": (with_field(5, 1, " 7"), 5, "column 0 is ' 7'"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(tmp_path, pixels, case):
    change, line, words = BAD[case]
    lines = lines_of(pixels)
    change(lines)
    path = tmp_path / "submission.csv"
    path.write_text("".join(f"{line}\n" for line in lines))
    done = check(path)
    errors = [text for text in done.stderr.splitlines() if not text.startswith("checking")]
    assert done.returncode == 2 and done.stdout == ""
    assert len(errors) == 1, done.stderr
    assert f"{path}, line {line}:" in errors[0] and words in errors[0]


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_refuses_what_is_no_file(tmp_path, name):
    done = check(tmp_path / name)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.fixture
def truth(tmp_path):
    """Frames larger than the prediction; sorted by name they are not sorted by number."""
    rng = np.random.default_rng(1)
    for sequence in range(SEQUENCES):
        (tmp_path / "truth" / str(sequence)).mkdir(parents=True)
        for t in range(FRAMES):
            pixels = rng.integers(0, 256, (3 * HEIGHT, 2 * WIDTH, 3), dtype=np.uint8)
            path = tmp_path / "truth" / str(sequence) / f"frame{t + 8}.png"  # 8, 9, 10, 11
            Image.fromarray(pixels).save(path)
    return tmp_path / "truth"


def test_scores_as_the_definition_says(tmp_path, pixels, truth):
    path = tmp_path / "submission.csv"
    path.write_text("\n".join(lines_of(pixels)) + "\n")
    transform = Compose([Resize((HEIGHT, WIDTH)), ToTensor()])
    expected = np.empty((SEQUENCES, FRAMES - 1))
    for sequence in range(SEQUENCES):
        for t in range(1, FRAMES):
            frame = transform(
                Image.open(truth / str(sequence) / f"frame{t + 8}.png").convert("RGB")
            ).double()
            predicted = torch.tensor(pixels[sequence * FRAMES + t]).view(3, HEIGHT, WIDTH) / 255
            expected[sequence, t - 1] = -10 * torch.log10(((frame - predicted) ** 2).mean())
    done = check(path, "--ground_truth", truth)
    assert done.returncode == 0, done.stderr
    assert "frame 0 is given" in done.stdout
    table = [line.split()[1:4] for line in done.stdout.splitlines()[-SEQUENCES - 1 :]]
    wanted = [[row.mean(), row.min(), row[-1]] for row in expected] + [
        [expected.mean(), expected.min(), expected[:, -1].mean()]
    ]
    assert np.allclose(np.array(table, dtype=float), wanted, atol=6e-4)


def test_ground_truth_must_be_whole(tmp_path, pixels, truth):
    path = tmp_path / "submission.csv"
    path.write_text("\n".join(lines_of(pixels)) + "\n")
    (truth / "1" / "frame9.png").unlink()
    done = check(path, "--ground_truth", truth)
    assert done.returncode == 2 and done.stdout == ""
    assert str(truth / "1") in done.stderr.splitlines()[-1]
    assert "3 images; expected 4" in done.stderr
    (truth / "1" / "frame9.png").write_bytes(b"no image")
    done = check(path, "--ground_truth", truth)
    assert done.returncode == 2 and "frame9.png" in done.stderr.splitlines()[-1]


@pytest.fixture
def among_broken_files(tmp_path):
    """The script and utils/ beside third-party Trainer.py, Tester.py and dataloader.py.

    The large packages are missing.
    """
    root = tmp_path / "project"
    for name in ("utils", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Trainer", "Tester", "dataloader"):
        (root / f"{name}.py").write_text("raise RuntimeError('not the project this is')\n")
    for name in ("torch", "torchvision", "tqdm", "matplotlib", "imageio"):
        (root / "scripts" / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    return root / "scripts" / "check_submission.py"


def test_depends_on_utils_and_numpy_alone(tmp_path, pixels, truth, among_broken_files):
    path = tmp_path / "submission.csv"
    path.write_text("\n".join(lines_of(pixels)) + "\n")
    done = run_cli(among_broken_files, path, *SHAPE)
    assert done.returncode == 0 and done.stdout.startswith("accepted") and not done.stderr
    path.write_text("\n".join(lines_of(pixels)[:-1]) + "\n")
    done = run_cli(among_broken_files, path, *SHAPE)
    assert done.returncode == 2 and "ends after 7 rows" in done.stderr
    done = run_cli(among_broken_files, path, *SHAPE, "--ground_truth", truth)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_reading_true_frames_says_what_it_needs(tmp_path, pixels, truth, among_broken_files):
    path = tmp_path / "submission.csv"
    path.write_text("\n".join(lines_of(pixels)) + "\n")
    done = run_cli(among_broken_files, path, *SHAPE, "--ground_truth", truth)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert "--ground_truth" in done.stderr and "dataloader.py" in done.stderr


def test_exact_frames_score_100_dB(tmp_path, truth):
    files = [truth / str(i) / f"frame{t + 8}.png" for i in range(SEQUENCES) for t in range(FRAMES)]
    frames = [Image.open(file).resize((WIDTH, HEIGHT), Image.BILINEAR) for file in files]
    rows = np.stack([np.asarray(frame) for frame in frames]).transpose(0, 3, 1, 2)
    path = tmp_path / "submission.csv"
    path.write_text("\n".join(lines_of(rows.reshape(len(frames), -1))) + "\n")
    done = check(path, "--ground_truth", truth)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split()[1:4] == ["100.000"] * 3
