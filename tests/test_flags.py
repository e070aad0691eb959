"""The flags: help, checked ranges, what beats what, and docs/FLAGS.md."""

import argparse
import os
import re
import subprocess
import sys

import pytest
import torch

import Tester
import Trainer
from conftest import ROOT, in_process
from scripts import flags_page
from utils import cli, options
from utils.hardware import check_torch

PARSERS = {"Trainer": Trainer.build_parser, "Tester": Tester.build_parser}
TEMPLATE = {
    "batch_size": 2, "lr": 0.001, "optim": "Adam", "gpu": 1, "test": False, "num_workers": 4,
    "num_epoch": 70, "per_save": 3, "partial": 1.0, "train_vi_len": 16, "val_vi_len": 630,
    "frame_H": 32, "frame_W": 64, "F_dim": 128, "L_dim": 32, "N_dim": 12, "D_out_dim": 192,
    "tfr": 1.0, "tfr_sde": 10, "tfr_d_step": 0.1, "ckpt_path": None, "fast_train": False,
    "fast_partial": 0.4, "fast_train_epoch": 5, "kl_anneal_type": "Cyclical", "kl_anneal_cycle": 10,
    "kl_anneal_ratio": 1, "tfr_min": 0.0
}
ONLY = {"store_visualization": "Trainer", "no_sanity": "Tester", "make_gif": "Tester"}


def actions(program):
    """Every flag but --help, and without the forms that switch one off."""
    return [
        action
        for action in PARSERS[program]()._actions
        if action.dest != "help" and f"--{action.dest}" in action.option_strings
    ]


ALL = {action.dest: action for program in PARSERS for action in actions(program)}

# values that each flag refuses; every flag that takes one must be here
NUMBERS = ["abc", "", "nan", "inf", "1e999", "0x10", "1,5"]
WHOLE = [*NUMBERS, "1.5", "-1", "99999999999999999999"]
SHARE = [*NUMBERS, "-0.1", "1.1"]
REFUSED = {
    **dict.fromkeys(("DR", "save_root", "cache_dir", "ckpt_path"), [""]),
    **dict.fromkeys(("frame_H", "frame_W"), [*WHOLE, "0", "3", "4097"]),
    **dict.fromkeys(("F_dim", "D_out_dim"), [*WHOLE, "0", "4", "12", "8200"]),
    "L_dim": [*WHOLE, "0", "1", "3"],
    "N_dim": [*WHOLE, "0", "2", "6"],
    "num_workers": [*WHOLE, "257"],
    **dict.fromkeys(("batch_size", "kl_anneal_cycle", "gpu", "per_save"), [*WHOLE, "0"]),
    "num_epoch": [*WHOLE, "0", "100001"],
    **dict.fromkeys(("train_vi_len", "val_vi_len"), [*WHOLE, "0", "1"]),
    **dict.fromkeys(("fast_train_epoch", "tfr_sde", "save_every_steps"), WHOLE),
    "pool": [*WHOLE, "65537"],
    "seed": [*WHOLE, str(2**31)],
    "rollouts": [*WHOLE, "0", "65"],
    **dict.fromkeys(("partial", "fast_partial", "kl_anneal_ratio"), [*SHARE, "0"]),
    **dict.fromkeys(("tfr", "tfr_d_step", "tfr_min", "next_share"), SHARE),
    "ema": [*SHARE, "1"],
    "lr": [*NUMBERS, "0", "-0.001", "10.1"],
    "kl_weight": [*NUMBERS, "-1"],
    "max_minutes": [*NUMBERS, "0", "-1", "1e7"],
    "device": ["", "gpu", "cuda:", "cuda:x", "cuda:01", "cuda:1000", "cpu:1", "CPU"],
    "kl_anneal_type": ["", "Cosine", "Cyclical "],
    **dict.fromkeys(
        ("output", "objective", "recipe", "optim", "schedule", "tf_coin", "precision", "z"),
        ["", "none of these", "ADAM"],
    ),
}


@pytest.mark.parametrize("program", PARSERS)
def test_no_flag_is_required_and_every_flag_has_a_help(program):
    parser = PARSERS[program]()
    assert isinstance(parser, argparse.ArgumentParser)
    parser.parse_args([])
    assert all(action.help and not action.required for action in parser._actions)
    text = parser.format_help()
    assert all(f"--{action.dest}" in text for action in actions(program))
    # the Tester takes flags of training for compatibility
    assert "of them --seed alone" in " ".join(text.split())


def test_every_flag_that_takes_a_value_has_a_checked_range():
    assert {dest for dest, action in ALL.items() if action.nargs != 0} == REFUSED.keys()
    assert all(action.type or action.choices for action in ALL.values() if action.nargs != 0)


@pytest.mark.parametrize("dest", REFUSED)
def test_values_out_of_range(dest, capsys):
    for value in REFUSED[dest]:
        for program, build in PARSERS.items():
            with pytest.raises(SystemExit) as stop:
                build().parse_args([f"--{dest}={value}"])
            stderr = capsys.readouterr().err
            assert stop.value.code == 2 and stderr.count("\n") == 1, (value, stderr)
            assert f"--{dest}" in stderr, (value, stderr)
            assert stderr.startswith(f"{program}.py: error:")


@pytest.mark.parametrize(
    "words, named",
    [
        (["--fast_train=1"], "--fast_train"),
        (["--tfr"], "--tfr"),
        (["--unknown", "1"], "--unknown"),
        (["--batch", "2"], "--batch"),
        (["--lr", "-inf"], "--lr"),
        (["stray"], "stray"),
        (["two\nlines"], "two lines"),
        (["--recipe", "two\nlines"], "--recipe"),
    ],
)
@pytest.mark.parametrize("main", [Trainer.main, Tester.main])
def test_words_that_are_no_flags(words, named, main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1 and named in stderr


@pytest.mark.parametrize(
    "main, flags, named",
    [
        (Trainer.main, [], "--save_root"),
        (Trainer.main, ["--save_root", "out"], "--DR"),
        (Tester.main, [], "--ckpt_path"),
        (Tester.main, ["--DR", "d", "--save_root", "out"], "--ckpt_path"),
        (Trainer.main, ["--save_root", "out", "--test"], "--ckpt_path"),
        (Trainer.main, ["--save_root", "out", "--DR", "d", "--device", "cuda:99"], "--device"),
        (Trainer.main, ["--save_root", "out", "--DR", "d", "--gpu", "2"], "torchrun"),
    ],
)
def test_what_is_missing_is_named(main, flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UserError, match=named):
        main(flags)
    assert not any(tmp_path.iterdir())


IDLE = """
import builtins, io
real = open
builtins.open = lambda path, *rest, **named: (
    io.StringIO("cpu0 9 9 9 9 9 9 9\\n") if path == "/proc/stat" else real(path, *rest, **named))
"""


@pytest.fixture
def busy_process():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("module, before, given, expected", [
    ("Trainer", "", {}, "2000"),
    ("Tester", "", {}, "2000"),
    ("scripts.benchmark", "", {}, "2000"),
    ("dataloader", IDLE, {}, None),  # alone, spinning is faster
    ("dataloader", "", {"OMP_WAIT_POLICY": "passive"}, "0"),
    ("dataloader", "", {"GOMP_SPINCOUNT": "300"}, "300"),
])
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_threads_spin_less_on_a_busy_machine(busy_process, module, before, given, expected):
    """What libgomp itself says at its start: 100 s in place of 1 s a step beside a busy process."""
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\nimport {module}"],
        cwd=ROOT, capture_output=True, text=True,
        env={**environment, "OMP_DISPLAY_ENV": "verbose", **given},
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this build of PyTorch has another OpenMP than GNU's")
    said = done.stderr.partition("GOMP_SPINCOUNT = '")[2].partition("'")[0]
    if expected is None:
        assert int(said) > 2000
    else:
        assert said == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_torchrun_does_not_take_the_cpu_for_cuda(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cli.UserError, match="--device cuda:0"):
        Trainer.main(["--save_root", str(tmp_path / "out"), "--DR", "d", "--device", "cuda"])
    assert not any(tmp_path.iterdir())


def test_one_gpu_is_not_for_several_processes(tmp_path, monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cli.UserError, match="--device cuda:0: can't be shared by 2 processes"):
        Trainer.main(["--save_root", str(tmp_path / "out"), "--DR", "d", "--device", "cuda:0"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("program", PARSERS)
def test_a_flag_beats_the_recipe_which_beats_the_template(program):
    parse = PARSERS[program]().parse_args
    pool = options.RECIPES["pool"]
    # the recipe of the recommended command
    assert {name: getattr(parse([]), name) for name in pool} == pool
    template = vars(parse(["--recipe", "template"]))
    assert {name: template[name] for name in TEMPLATE} == TEMPLATE
    for name in pool:  # also where the flag repeats the template's default
        default = ALL[name].default
        words = [f"--{name}"] if default is False else [f"--{name}", str(default)]
        args = parse(words)
        assert getattr(args, name) == (True if default is False else default)
        assert args.given == [name]


def test_trainer_and_tester_share_their_flags():
    own, other = (
        {action.dest: (action.default, action.help, action.choices) for action in actions(program)}
        for program in PARSERS
    )
    assert set(own.keys() ^ other.keys()) == ONLY.keys()
    assert all(own[name] == other[name] for name in own.keys() & other.keys())
    assert all(options.RECIPES["pool"].keys() <= flags.keys() for flags in (own, other))


def test_a_namespace_without_recipe_trains_the_templates_way():
    args = Trainer.build_parser().fill(argparse.Namespace(lr=0.5))
    assert args.lr == 0.5 and args.recipe == "template" and args.tfr == 1.0 and args.pool == 0
    assert args.batch_size == 2


# ---------------------------------------------------------------- docs/FLAGS.md

def test_the_page_of_flags_is_what_its_script_prints(capsys):
    flags_page.main()
    page = (ROOT / "docs" / "FLAGS.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page, "python scripts/flags_page.py > docs/FLAGS.md"


def test_FLAGS_has_each_flag_with_both_recipes_defaults():
    rows = re.findall(r"^\| `--(\w+)`[^|]*\| (.*?) \| (.*?) \|", flags_page.page(), re.M)
    assert sorted(name for name, *_ in rows) == sorted(ALL)
    switches = {"off": "False", "on": "True", "": "None"}
    template, default = ({row[0]: switches.get(row[i], row[i].strip("*`")) for row in rows}
                         for i in (1, 2))
    expected = {**TEMPLATE, "kl_anneal_ratio": 1.0, "recipe": "template"}
    assert {name: template[name] for name in expected} == {k: str(v) for k, v in expected.items()}
    expected = {**options.RECIPES["pool"], "tfr_sde": 10, "recipe": "pool", "refresh_norm": "on"}
    assert {name: default[name] for name in expected} == {k: str(v) for k, v in expected.items()}


@pytest.mark.parametrize("script", [Trainer, Tester])
def test_an_old_pytorch_is_one_line(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.4.1"))
    status = in_process(
        script.main, "--DR", tmp_path, "--save_root", tmp_path / "run",
        "--ckpt_path", tmp_path / "best.ckpt"
    )
    assert status == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "PyTorch 2.4.1" in err and "2.6" in err


@pytest.mark.parametrize("version", ["2.6.0a0+ecf3bae40a.nv25.01", "2.10.0", "3.0"])
def test_a_new_pytorch_is_taken(version, monkeypatch):
    """NVIDIA's containers have pre-releases."""
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    check_torch()
