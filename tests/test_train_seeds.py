"""scripts/train_seeds.sh: N seeds, resumed like a sweep, tested together; Trainer.py and Tester.py only pretend."""

import json
import shutil
import signal

import pytest
from test_sweep import PRETENDER, project, starts, sweep, until  # noqa: F401

# a pretender whose seed n has PSNRs of 30 + n, less 5 in the worst frame, 1 more in the last; together 3 more
TRAINER = PRETENDER.replace('''    args = build_parser().parse_args()
''', '''    def write_psnr(root, mean):
        values = [mean - 5, mean + 4, mean + 1]
        lines = [f"{t},{value}" for t, value in enumerate(values, 1)]
        (root / "psnr_per_frame.csv").write_text("\\n".join(["frame,psnr", *lines]) + "\\n")

    if "--test" in sys.argv:
        root, first = Path(sys.argv[sys.argv.index("--save_root") + 1]), sys.argv.index("--ckpt_path") + 1
        files = [word for word in sys.argv[first:] if word.endswith("best.ckpt")]
        assert all(Path(file).is_file() for file in files)
        with open(os.environ["STARTS"], "a") as starts:
            print(root.name, *sys.argv[1:], file=starts)
        if root.name == os.environ.get("FAILS"):
            sys.exit("no luck")
        root.mkdir(exist_ok=True)
        time.sleep(float(os.environ.get("PACE", 0)))
        write_psnr(root, 33)
        sys.exit(0)
    args = build_parser().parse_args()
''') + '''
    (root / "best.ckpt").touch()
    write_psnr(root, 30 + args.seed)
'''
TESTER = '''
import os, sys
from pathlib import Path
root = Path(sys.argv[sys.argv.index("--save_root") + 1])
print(root.name, *sys.argv[1:], file=open(os.environ["STARTS"], "a"))
(root / "submission.csv").touch()
'''


@pytest.fixture
def seeds(project):  # noqa: F811
    """The pretended project, and a function that runs train_seeds.sh there."""
    tree = project / "a project"
    (tree / "Trainer.py").write_text(TRAINER)
    (tree / "Tester.py").write_text(TESTER)
    shutil.copy(tree / "scripts" / "train_seeds.sh", tree / "scripts" / "sweep_seeds.sh")  # the name that `sweep` starts
    return lambda *words, **options: sweep(project, "seeds", *words, **options)


def test_seeds_are_trained_tested_together_and_compared(seeds, project):  # noqa: F811
    done = seeds("data", "out", 2, "--num_epoch", 2, "--lr=0.002", "--fast_train", "--device", "cpu", "--store_visualization")
    assert done.returncode == 0, done.stderr
    first, second, test, together = starts(project)
    for n, line in enumerate((first, second)):
        assert line[0] == f"seed{n}" and line[line.index("--seed") + 1] == str(n)
        assert line[line.index("--save_root") + 1] == f"out/seed{n}"
        assert {"--resume", "--lr", "0.002", "--fast_train", "--store_visualization"} <= set(line)
    both = ["--ckpt_path", "out/seed0/best.ckpt", "out/seed1/best.ckpt", "--device", "cpu"]
    assert test == ["test", "--DR", "data", "--save_root", "out/test", *both]
    assert together == ["all", "--DR", "data", "--save_root", "out/all", "--test", *both]
    assert (project / "out" / "test" / "submission.csv").is_file()
    lines = [line.split() for line in done.stdout.splitlines()[-5:]]
    assert [line[-3:] for line in lines] == [["mean", "min", "last"], ["30.00", "25.00", "31.00"], ["31.00", "26.00", "32.00"],
                                             ["30.50", "25.50", "31.50"], ["33.00", "28.00", "34.00"]]
    assert [line[0] for line in lines[1:]] == ["seed0", "seed1", "mean", "together"]


def test_called_again_it_trains_only_what_is_missing(seeds, project):  # noqa: F811
    assert seeds("data", "out", 1, "--num_epoch", 1).returncode == 0
    more = seeds("data", "out", 2, "--num_epoch", 1, "--num_workers", 0)
    assert more.returncode == 0 and "seed0: done already" in more.stdout
    assert [line[0] for line in starts(project)] == ["seed0", "test", "all", "seed1", "test", "all"]
    assert all("out/seed1/best.ckpt" in line and "--num_workers" in line for line in starts(project)[4:])
    other = seeds("data", "out", 2, "--num_epoch", 3)
    assert other.returncode == 2 and "--num_epoch 1" in other.stderr


@pytest.mark.parametrize("fails, begun", [("seed0", ["seed0", "seed1"]), ("all", ["seed0", "seed1", "test", "all"])])
def test_a_failure_is_one_line_and_nothing_is_built_on_it(seeds, project, fails, begun):  # noqa: F811
    done = seeds("data", "out", 2, "--num_epoch", 1, FAILS=fails)
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 1 and f"{fails} failed with status 1: no luck" in line and "train.log" in line
    assert [line[0] for line in starts(project)] == begun
    assert "together" not in done.stdout
    assert fails not in json.loads((project / "out" / "sweep.json").read_text())["done"]


def test_a_stop_lets_the_run_save_and_the_same_command_resumes(seeds, project):  # noqa: F811
    process = seeds("data", "out", 2, "--num_epoch", 3, wait=False, PACE="0.7")
    until(lambda: (project / "out" / "seed0" / "history.csv").exists())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err + out
    assert [line[0] for line in starts(project)] == ["seed0"]
    assert seeds("data", "out", 2, "--num_epoch", 3).returncode == 0
    assert [line[0] for line in starts(project)] == ["seed0", "seed0", "seed1", "test", "all"]
    assert int(starts(project)[1][2]) > 0, "the first seed began again"


@pytest.mark.parametrize("words, said", [
    (["absent", "out", "1"], "absent"), (["data", "out"], "N"), (["data", "out", "0"], "0"), (["data", "out", "two"], "two"),
    (["data", "out", "1", "--seed", "3"], "--seed"), (["data", "out", "1", "--ckpt_path", "x"], "--ckpt_path"),
    (["data", "out", "1", "--save_root=x"], "--save_root"), (["data", "out", "1", "--no_such_flag"], "--no_such_flag")])
def test_user_errors_are_one_line_and_start_nothing(seeds, project, words, said):  # noqa: F811
    done = seeds(*words)
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and said in line
    assert not starts(project) and not (project / "out").exists()
