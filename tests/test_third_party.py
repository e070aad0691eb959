"""Third-party files and scripts: no code runs, checkpoints load, template scripts keep working."""

import argparse
import collections
import io
import json
import math
import os
import pickle
import re
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TINY, in_process

import Tester
import Trainer
from modules import Decoder_Fusion, Gaussian_Predictor, Generator, Label_Encoder, RGB_Encoder
from utils.checkpoint import NETWORKS, read_checkpoint
from utils.metrics import are_logits

SIZES = {"frame_H": 16, "frame_W": 32, "F_dim": 16, "L_dim": 8, "N_dim": 4, "D_out_dim": 16}
# the template's flags, with a run of seconds
TEMPLATE = {
    "batch_size": 2, "lr": 0.001, "device": "cpu", "optim": "Adam", "gpu": 1, "test": False,
    "DR": "", "save_root": "", "num_workers": 0, "num_epoch": 5, "per_save": 3, "partial": 1.0,
    "train_vi_len": 8, "val_vi_len": 20, "tfr": 1.0, "tfr_sde": 10, "tfr_d_step": 0.1,
    "ckpt_path": None, "fast_train": False, "fast_partial": 0.4, "fast_train_epoch": 5,
    "kl_anneal_type": "Cyclical", "kl_anneal_cycle": 2, "kl_anneal_ratio": 1,
    "store_visualization": False, **SIZES
}


@pytest.fixture(scope="module")
def ours(tiny_run):
    """A checkpoint of ours, its weights those of the whole file's tests."""
    return torch.load(tiny_run / "best.ckpt", weights_only=True)


@pytest.fixture
def template(ours):
    """A checkpoint as the template writes it: `optimizer` is a second copy of the weights."""
    return {
        "state_dict": ours["state_dict"],
        "optimizer": ours["state_dict"],
        "lr": 0.0005,
        "tfr": 0.7,
        "last_epoch": 3,
    }


def bare(**flags):
    """What somebody's script makes by hand, knowing the template's flags only."""
    return argparse.Namespace(**{**TEMPLATE, **flags})


def loaded(path, **flags):
    model = Trainer.VAE_Model(bare(ckpt_path=str(path), precision="fp32", **flags))
    model.load_checkpoint()
    return model


def equal(model, weights):
    own = model.state_dict()
    return own.keys() == weights.keys() and all(
        torch.equal(own[key], weights[key].to(own[key].dtype)) for key in own
    )


# ---------------------------------------------------------------- code in a file

class Planted:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def raw_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def old_format(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "write", [torch.save, old_format, raw_pickle], ids=["zip", "legacy", "pickle"]
)
@pytest.mark.parametrize("where", ["beside", "inside", "alone", "in place of args"])
@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "open", "getattr", "Path.touch"])
def test_code_in_a_checkpoint_never_runs(template, tmp_path, capfd, kind, where, write):
    trace = tmp_path / "trace"
    planted = {
        "os.system": Planted(os.system, f"touch {trace}"),
        "eval": Planted(eval, f"open({str(trace)!r}, 'w')"),
        "exec": Planted(exec, f"open({str(trace)!r}, 'w')"),
        "open": Planted(open, str(trace), "w"),
        "getattr": Planted(getattr, trace, "touch"),
        "Path.touch": Planted(type(trace).touch, trace),
    }[kind]
    content = {
        "beside": {**template, "note": planted},
        "inside": {**template, "optimizer": {"state": [planted]}},
        "alone": planted,
        "in place of args": {**template, "args": argparse.Namespace(DR=planted)},
    }[where]
    path = tmp_path / "planted.ckpt"
    write(content, path)
    assert (
        in_process(
            Tester.main, "--ckpt_path", path, "--save_root", tmp_path / "out", "--DR", tmp_path
        )
        == 2
    )
    if where == "alone":  # and once in training
        assert (
            in_process(
                Trainer.main, "--ckpt_path", path, "--save_root", tmp_path / "out", "--DR", tmp_path
            )
            == 2
        )
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == (2 if where == "alone" else 1) and all(
        "planted.ckpt" in line and "Traceback" not in line for line in lines
    )
    assert write is raw_pickle or all("holds code" in line for line in lines), lines
    assert sorted(os.listdir(tmp_path)) == ["planted.ckpt"]


def test_every_load_in_the_project_is_of_weights_only():
    loads = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("scripts/*.py")]:
        text = path.read_text(encoding="utf-8")
        loads += re.findall(r"torch\.load\([^\n]*", text)
        assert not re.search(
            r"pickle\.loads?\(|allow_pickle=True|np\.load\(|joblib|torch\.jit\.load", text
        ), path
    assert loads and all("weights_only=True" in load for load in loads)


# ---------------------------------------------------------------- checkpoints found in the wild

def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def wrapped(pattern, replacement, template):
    weights = template["state_dict"]
    return {re.sub(pattern, replacement, key): value for key, value in weights.items()}


def adam(template, kind=torch.optim.Adam, steps=1):
    """A real optimizer's state for the template's weights."""
    model = Trainer.VAE_Model(bare(precision="fp32"))
    optimizer = kind(model.parameters(), lr=0.0005)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer.state_dict()


WILD = {
    "as the template writes it": lambda t: t,
    "weights under optimizer only": lambda t: {k: v for k, v in t.items() if k != "state_dict"},
    "a real optimizer": lambda t: {**t, "optimizer": adam(t)},
    "another optimizer": lambda t: {**t, "optimizer": adam(t, torch.optim.SGD)},
    "another optimizer with a state": lambda t: {**t, "optimizer": adam(t, torch.optim.RMSprop)},
    "an optimizer of nothing": lambda t: {**t, "optimizer": {"state": {}, "param_groups": []}},
    "half an optimizer": lambda t: {
        **t,
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": adam(t)["param_groups"]},
    },
    "extra keys": lambda t: {
        **t,
        "epoch": 7,
        "best": {"psnr": 31.2},
        "loss": [0.1, 0.2],
        "note": "ok",
        "scheduler": {"milestones": collections.Counter([2, 4]), "gamma": 0.1},
        "when": None,
        "resume": True,
        "train_state_dict": "none",
    },
    "parsed arguments": lambda t: {**t, "args": bare(DR="elsewhere")},
    "arguments as a dict": lambda t: {
        **t,
        "args": {**vars(bare()), "lr": "fast", "optim": "SGD", "F_dim": -3, "unknown": 1},
    },
    "an ordered dict": lambda t: {**t, "state_dict": collections.OrderedDict(t["state_dict"])},
    "NumPy scalars": lambda t: {
        **t,
        "lr": np.float64(0.0005),
        "tfr": np.float32(0.7),
        "last_epoch": np.int64(3),
    },
    "NumPy arrays of one": lambda t: {
        **t,
        "lr": np.array(0.0005),
        "tfr": np.array([0.7]),
        "last_epoch": np.array(3, dtype=np.int32),
    },
    "tensors of one": lambda t: {
        **t,
        "lr": torch.tensor(0.0005),
        "tfr": torch.tensor([0.7]),
        "last_epoch": torch.tensor(3),
    },
    "module. prefixes": lambda t: {
        **t,
        "state_dict": prefixed("module.", t["state_dict"]),
        "optimizer": {},
    },
    "two prefixes": lambda t: {**t, "state_dict": prefixed("module._orig_mod.", t["state_dict"])},
    "networks compiled": lambda t: {**t, "state_dict": wrapped(r"^(\w+)\.", r"\1._orig_mod.", t)},
    "networks in parallel": lambda t: {**t, "state_dict": wrapped(r"^(\w+)\.", r"\1.module.", t)},
    "layers wrapped": lambda t: {
        **t,
        "state_dict": wrapped(
            r"^(\w+\.\d)\.", r"_fsdp_wrapped_module.\1._checkpoint_wrapped_module.", t
        ),
    },
    "model. and compiled": lambda t: {
        **t,
        "state_dict": wrapped(r"^(\w+)\.", r"model.\1._orig_mod.", t),
    },
    "net. prefixes": lambda t: {**t, "state_dict": prefixed("net.", t["state_dict"])},
    "half precision": lambda t: {
        **t,
        "state_dict": {
            k: v.half() if v.is_floating_point() else v for k, v in t["state_dict"].items()
        },
    },
    "parameters": lambda t: {
        **t,
        "state_dict": {
            k: nn.Parameter(v, v.is_floating_point()) for k, v in t["state_dict"].items()
        },
    },
}


@pytest.mark.parametrize("case", WILD)
def test_third_party_checkpoints_load_and_resume(case, template, tmp_path, capfd, tiny_data):
    content = WILD[case](template)
    path = tmp_path / "wild.ckpt"
    torch.save(content, path)
    weights = template["state_dict"]
    if case == "half precision":
        weights = content["state_dict"]
    model = loaded(path)
    assert equal(model, weights)
    assert (model.args.lr, model.current_epoch, model.kl_annealing.current_epoch) == (
        pytest.approx(0.0005),
        4,
        4,
    )
    assert model.tfr == pytest.approx(0.7) and type(model.args.lr) is type(model.tfr) is float
    assert model.optim.param_groups[0]["lr"] == pytest.approx(0.0005)
    img = torch.rand(1, 3, 3, 16, 32)
    assert torch.isfinite(model.training_one_step(img, img, True))
    assert (sum(len(state) for state in model.optim.state.values()) > 0) and not equal(
        model, weights
    )

    # and the commands take it
    assert (
        in_process(
            Tester.main,
            "--ckpt_path",
            path,
            "--DR",
            tiny_data,
            "--frame_H",
            16,
            "--frame_W",
            32,
            "--val_vi_len",
            20,
            "--no_sanity",
            "--device",
            "cpu",
            "--precision",
            "fp32",
        )
        == 0
    ), capfd.readouterr().err
    assert (tmp_path / "test" / "submission.csv").exists()


def test_a_real_optimizer_is_taken(template, tmp_path):
    state = adam(template, steps=3)
    torch.save({**template, "optimizer": state}, tmp_path / "wild.ckpt")
    for own in state["state"].values():  # third-party tensors are not channels-last
        own["exp_avg"] = torch.rand_like(own["exp_avg"]).contiguous()
    torch.save({**template, "optimizer": state}, tmp_path / "wild.ckpt")
    model = loaded(tmp_path / "wild.ckpt")
    optimizer = model.optim.state_dict()["state"]
    assert optimizer[0]["step"] == 3
    for i, parameter in enumerate(
        model.parameters()
    ):  # in the layout of our weights: the fused kernels walk both alike
        assert torch.equal(optimizer[i]["exp_avg"], state["state"][i]["exp_avg"])
        assert optimizer[i]["exp_avg"].stride() == parameter.stride()


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("lr", None, 0.001),
        ("lr", float("nan"), 0.001),
        ("lr", "fast", 0.001),
        ("lr", [0.1], 0.001),
        ("lr", -1.0, 0.001),
        ("tfr", None, 1.0),
        ("tfr", 3, 1.0),
        ("last_epoch", None, 0),
        ("last_epoch", "x", 0),
        ("last_epoch", -7, 0),
        ("last_epoch", float("inf"), 0),
        ("last_epoch", 4.0, 5),
    ],
)
def test_impossible_values_are_ignored(template, tmp_path, field, value, expected):
    torch.save({**template, field: value}, tmp_path / "wild.ckpt")
    model = loaded(tmp_path / "wild.ckpt")
    assert {"lr": model.args.lr, "tfr": model.tfr, "last_epoch": model.current_epoch}[
        field
    ] == expected


def test_a_bare_state_dict(template, tmp_path):
    torch.save(template["state_dict"], tmp_path / "weights.pt")
    model = loaded(tmp_path / "weights.pt")
    assert (
        equal(model, template["state_dict"])
        and model.current_epoch == 0
        and model.args.lr == 0.001
        and model.tfr == 1.0
    )
    assert (
        read_checkpoint(tmp_path / "weights.pt")["state_dict"].keys()
        == template["state_dict"].keys()
    )


def test_the_old_format(template, tmp_path):
    old_format(template, tmp_path / "old.ckpt")
    assert equal(loaded(tmp_path / "old.ckpt"), template["state_dict"])


@pytest.mark.parametrize("write", [torch.save, old_format], ids=["zip", "legacy"])
def test_weights_saved_on_a_gpu(template, tmp_path, monkeypatch, write):
    monkeypatch.setattr(
        torch.serialization, "location_tag", lambda storage: "cuda:3"
    )  # what saving on a GPU writes
    write(template, tmp_path / "gpu.ckpt")
    monkeypatch.undo()
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "gpu.ckpt", weights_only=True)  # the file really says so
    model = loaded(tmp_path / "gpu.ckpt")
    assert equal(model, template["state_dict"]) and model.device.type == "cpu"


def test_a_checkpoint_of_ours_needs_no_allowances(ours):
    """torch.load(weights_only=True) has just read it; its numbers are plain."""
    assert {key.split(".")[0] for key in ours["state_dict"]} == set(NETWORKS)
    assert {"state_dict", "optimizer", "lr", "tfr", "last_epoch"} <= ours.keys() and ours[
        "optimizer"
    ]["state"]
    assert type(ours["args"]) is dict and ours["last_epoch"] in (0, 1)
    json.dumps([ours[key] for key in ("lr", "tfr", "last_epoch", "args")])


REFUSED = {
    "not a checkpoint": lambda path, t: path.write_bytes(b"these are not weights" * 100),
    "empty": lambda path, t: path.write_bytes(b""),
    "half": lambda path, t: (
        torch.save(t, path),
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    ),
    "half, in the old format": lambda path, t: (
        old_format(t, path),
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    ),
    "a flipped header": lambda path, t: (
        torch.save(t, path),
        path.write_bytes(b"XX" + path.read_bytes()[2:]),
    ),
    "a text": lambda path, t: torch.save("weights", path),
    "a list": lambda path, t: torch.save([t], path),
    "a tensor": lambda path, t: torch.save(torch.zeros(3), path),
    "a whole model": lambda path, t: torch.save(nn.Linear(2, 2), path),
    "a script module": lambda path, t: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
    "no weights": lambda path, t: torch.save({"lr": 0.1}, path),
    "weights of another network": lambda path, t: torch.save(
        {"state_dict": {"conv.weight": torch.zeros(3)}}, path
    ),
    "a missing key": lambda path, t: torch.save(
        {k: v for k, v in t["state_dict"].items() if k != "Generator.7.bias"}, path
    ),
    "two models": lambda path, t: torch.save(
        {**t["state_dict"], "module.Generator.7.bias": torch.zeros(3)}, path
    ),
    "a key too many": lambda path, t: torch.save(
        {**t["state_dict"], "Generator.8.bias": torch.zeros(3)}, path
    ),
    "a network missing": lambda path, t: torch.save(
        {k: v for k, v in t["state_dict"].items() if "RGB" not in k and "frame_" not in k}, path
    ),
    "one weight of another size": lambda path, t: torch.save(
        {**t["state_dict"], "Generator.7.bias": torch.zeros(4)}, path
    ),
    "sizes that can't be": lambda path, t: torch.save(
        {**t["state_dict"], "frame_transformation.6.weight": torch.zeros(3)}, path
    ),
    "a size of nothing": lambda path, t: torch.save(
        {**t["state_dict"], "Decoder_Fusion.5.weight": torch.zeros(0)}, path
    ),
    "weights without values": lambda path, t: torch.save(
        {k: v.to("meta") for k, v in t["state_dict"].items()}, path
    ),
    "sparse weights": lambda path, t: torch.save(
        {k: v.to_sparse() for k, v in t["state_dict"].items()}, path
    ),
    "a folder": lambda path, t: path.mkdir(),
    "nothing there": lambda path, t: None,
    "a link that points nowhere": lambda path, t: path.symlink_to("nowhere"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_checkpoint_of_ours(case, template, tmp_path, capfd, tiny_data):
    path = tmp_path / "bad.ckpt"
    REFUSED[case](path, template)
    for main in (Trainer.main, Tester.main):
        words = "--DR", tiny_data, "--save_root", tmp_path / "out", "--ckpt_path", path
        assert in_process(main, *words, "--device", "cpu") == 2
        stderr = capfd.readouterr().err
        assert stderr.count("\n") == 1 and "bad.ckpt" in stderr and "Traceback" not in stderr, (
            stderr
        )
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main", [Trainer.main, Tester.main])
def test_other_sizes_than_asked_for(main, tiny_data, tiny_run, tmp_path, capfd):
    best = tiny_run / "best.ckpt"
    words = "--DR", tiny_data, "--save_root", tmp_path / "out", "--ckpt_path", best
    assert in_process(main, *words, "--F_dim", 32) == 2
    stderr = capfd.readouterr().err
    assert (
        stderr.count("\n") == 1
        and "best.ckpt" in stderr
        and "--F_dim" in stderr
        and not (tmp_path / "out").exists()
    )


# ---------------------------------------------------------------- third-party scripts

ATTRIBUTES = ["optim", "scheduler", "kl_annealing", "mse_criterion", "current_epoch", "tfr",
              "tfr_d_step", "tfr_sde", "train_vi_len", "val_vi_len", "batch_size"]


def namespaces(data, root):
    """Return a script's Namespaces by how many flags they have: all of the template's or fewer."""
    paths = {"DR": str(data), "ckpt_path": str(root / "epoch=3.ckpt")}
    saving = {**paths, "save_root": str(root / "out")}
    small = {"val_vi_len": 20, "device": "cpu", **SIZES}
    fewer = {"train_vi_len": 8, "num_epoch": 5, "lr": 0.001, **small}
    return {"the template's": bare(**saving),
            "fewer": argparse.Namespace(**saving, **fewer),
            "next to none": argparse.Namespace(**paths, **small)}


@pytest.mark.parametrize("flags", ["the template's", "fewer", "next to none"])
def test_a_script_with_a_bare_namespace(flags, template, tiny_data, tmp_path):
    torch.save(template, tmp_path / "epoch=3.ckpt")
    model = Trainer.VAE_Model(namespaces(tiny_data, tmp_path)[flags]).to("cpu")
    model.load_checkpoint()
    assert isinstance(model.eval(), float) and model.training
    if flags == "next to none":
        return
    for img, label in model.val_dataloader():
        loss, psnrs = model.val_one_step(img, label)
        assert float(loss) > 0 and len(psnrs) == 19
        assert all(isinstance(psnr, float) for psnr in psnrs)
        assert np.mean(psnrs) == pytest.approx(model.eval(), abs=1e-4)
    for img, label in model.train_dataloader():
        for teacher in (True, False):
            assert torch.isfinite(model.training_one_step(img, label, teacher))
    assert all(hasattr(model, name) for name in ATTRIBUTES)
    model.save(str(tmp_path / "mine.ckpt"))
    assert equal(model, torch.load(tmp_path / "mine.ckpt", weights_only=True)["state_dict"])
    model.training_stage()  # from epoch 4, the one after the checkpoint's, to the last
    assert model.current_epoch == 5 and (tmp_path / "out" / "best.ckpt").exists()
    rows = (tmp_path / "out" / "history.csv").read_text().splitlines()
    assert len(rows) == 2 and rows[1].startswith("4,0.0005,")


def test_a_step_with_no_data_and_no_training_stage():
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args(TINY))
    img = torch.rand(2, 3, 3, 16, 32)
    for teacher in (True, False, torch.tensor([True, False, True])):
        assert torch.isfinite(model.training_one_step(img, img, teacher))


def test_a_criterion_of_ones_own():
    model = Trainer.VAE_Model(bare(precision="fp32"))
    img = torch.rand(1, 3, 3, 16, 32)
    for criterion in (nn.L1Loss(), lambda generated, truth: (generated - truth).abs().mean()):
        if hasattr(model, "mse_criterion"):
            del model.mse_criterion
        model.mse_criterion = criterion
        torch.manual_seed(0)
        _, found, _, _ = model(img, img, True)
        model.mse_criterion = nn.MSELoss()
        torch.manual_seed(0)
        _, squared, _, _ = model(img, img, True)
        assert found > squared  # of differences below 1


class NetworksOnly(Trainer.VAE_Model):
    """As the template's Tester: nn.Module's constructor, the five networks, a few attributes."""

    def __init__(self, args, **attributes):
        super(Trainer.VAE_Model, self).__init__()
        self.args = args
        self.frame_transformation = RGB_Encoder(3, args.F_dim)
        self.label_transformation = Label_Encoder(3, args.L_dim)
        self.Gaussian_Predictor = Gaussian_Predictor(args.F_dim + args.L_dim, args.N_dim)
        self.Decoder_Fusion = Decoder_Fusion(args.F_dim + args.L_dim + args.N_dim, args.D_out_dim)
        self.Generator = Generator(args.D_out_dim, 3)
        for name, value in attributes.items():
            setattr(self, name, value)


class OverridesAll(NetworksOnly):
    """A third-party tester: it overrides what the template's overrides, and make_gif too."""

    def __init__(self, args):
        super().__init__(
            args,
            mse_criterion=nn.MSELoss(),
            current_epoch=0,
            val_vi_len=args.val_vi_len,
            batch_size=args.batch_size,
        )

    def forward(self, img, label):
        raise NotImplementedError("nobody calls it")

    def val_dataloader(self):
        dataset = Trainer.Dataset_Dance(
            self.args.DR, Trainer.frame_transform(self.args.frame_H, self.args.frame_W), "test"
        )
        return torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=0, shuffle=False)

    def load_checkpoint(self):
        content = torch.load(self.args.ckpt_path, map_location="cpu")
        self.load_state_dict(content["state_dict"], strict=True)

    @torch.no_grad()
    def eval(self):
        self.made = []
        for idx, (img, label) in enumerate(self.val_dataloader()):
            img, label = img.to(self.args.device), label.to(self.args.device)
            self.val_one_step(img, label, idx)
        return self.made

    def val_one_step(self, img, label, idx=0):
        img, label = img.permute(1, 0, 2, 3, 4), label.permute(1, 0, 2, 3, 4)
        frames = [img[0]]
        for t in range(1, self.val_vi_len):
            z = torch.randn(
                1, self.args.N_dim, self.args.frame_H, self.args.frame_W, device=self.args.device
            )
            fused = self.Decoder_Fusion(
                self.frame_transformation(frames[-1]), self.label_transformation(label[t]), z
            )
            frames.append(self.Generator(fused).clamp(0, 1))
        self.make_gif(frames[0], f"pred_seq{idx}.gif")
        self.made.append(torch.stack(frames, 1))

    def make_gif(self, images_list, img_name):
        pass


def test_a_script_that_subclasses_as_the_templates_tester_does(
        ours, tiny_data, tiny_run, tmp_path):
    """With a checkpoint of ours, which torch.load reads without allowances."""
    model = OverridesAll(bare(
        DR=str(tiny_data), save_root=str(tmp_path / "out"), batch_size=1,
        ckpt_path=str(tiny_run / "best.ckpt")))
    assert model.training
    model.load_checkpoint()
    assert equal(model, ours["state_dict"])
    made = model.eval()
    assert len(made) == 5 and made[0].shape == (1, 20, 3, 16, 32)
    assert torch.isfinite(made[0]).all()
    assert equal(model, ours["state_dict"])  # its rollouts move no statistics of BatchNorm


def test_a_tester_left_in_training_mode_scores_as_ours(
        ours, tiny_data, tiny_run, tmp_path, monkeypatch):
    """Blank and nearly blank poses: BatchNorm must not normalize each of them by itself."""
    args = bare(DR=str(tiny_data), save_root=str(tmp_path), ckpt_path=str(tiny_run / "best.ckpt"))
    theirs = OverridesAll(argparse.Namespace(**{**vars(args), "batch_size": 1}))
    theirs.load_checkpoint()
    mine = Trainer.VAE_Model(argparse.Namespace(**vars(args), precision="fp32", z="zero"))
    mine.load_checkpoint()
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: torch.zeros(shape))

    dataset = Tester.Dataset_Dance(tiny_data, Trainer.frame_transform(16, 32), video_len=20)
    first, label = dataset[3]
    label = label.clone()
    label[5:] = label[0, :, :1, :1]  # the background
    label[7:, :, 8, 8] += 1 / 255
    theirs.made = []
    with torch.no_grad():
        theirs.val_one_step(first[None], label[None])
    (found,) = theirs.made
    assert torch.isfinite(found).all()
    assert torch.allclose(found[:, 1:], mine.rollout(first, label[None]), atol=1e-4)


@pytest.mark.parametrize("way", ["load_state_dict", "load_checkpoint"])
def test_networks_alone_evaluate_and_then_train_in_a_step(way, template, tmp_path):
    torch.save(template, tmp_path / "wild.ckpt")
    model = NetworksOnly(bare(ckpt_path=str(tmp_path / "wild.ckpt")))
    if way == "load_checkpoint":
        model.load_checkpoint()
    else:
        assert not model.load_state_dict(template["state_dict"], strict=True).missing_keys
    assert not any(module.training for module in model.modules())
    img = torch.rand(2, 3, 3, 16, 32)
    for _ in range(2):
        before = [buffer.clone() for buffer in model.buffers()]
        model.val_one_step(img, img)
        assert all(map(torch.equal, before, model.buffers()))
        model.training_one_step(img, img, True)
        assert all(module.training for module in model.modules())
        assert not any(map(torch.equal, before, model.buffers()))


def test_a_trainer_of_ours_stays_in_training_mode(template):
    model = Trainer.VAE_Model(bare())
    model.load_state_dict(template["state_dict"])
    assert model.training


# ---------------------------------------------------------------- our checkpoints elsewhere


@pytest.mark.parametrize("recipe, peak", [("pool", 2e-3), ("template", 1e-3)])
def test_a_finished_runs_learning_rate_can_train(recipe, peak, tiny_data, tmp_path):
    """A third-party Trainer does Adam(lr=checkpoint["lr"]); the end of a cosine would be 0."""
    flags = ["--DR", tiny_data, "--save_root", tmp_path, *TINY, "--num_epoch", 1,
             "--recipe", recipe, "--train_vi_len", 4]
    assert in_process(Trainer.main, *flags) == 0
    for name in ("best.ckpt", "last.ckpt", "epoch=0.ckpt"):
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        assert checkpoint["lr"] == pytest.approx(peak)
    model = NetworksOnly(bare())
    model.load_state_dict(checkpoint["state_dict"])
    optimizer = torch.optim.Adam(model.parameters(), lr=checkpoint["lr"])
    model.Generator[7].bias.sum().backward()
    optimizer.step()
    moved = (model.Generator[7].bias - checkpoint["state_dict"]["Generator.7.bias"]).abs()
    assert moved.max().item() == pytest.approx(peak, rel=1e-3)


def test_a_resume_does_not_read_the_learning_rate(tiny_data, tmp_path):
    flags = ["--DR", tiny_data, *TINY, "--num_epoch", 1, "--save_root"]
    assert in_process(Trainer.main, *flags, tmp_path / "a") == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    last = torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)
    torch.save({**last, "lr": 7.0}, tmp_path / "b" / "last.ckpt")
    results = []
    for name in "ab":
        assert in_process(Trainer.main, *flags, tmp_path / name, "--num_epoch", 2, "--resume") == 0
        results.append(torch.load(tmp_path / name / "last.ckpt", weights_only=True))
    assert results[0]["lr"] == results[1]["lr"] == pytest.approx(2e-3)
    for key, value in results[0]["train_state_dict"].items():
        assert torch.equal(value, results[1]["train_state_dict"][key])


# ---------------------------------------------------------------- a sigmoid of their own


@pytest.fixture(scope="module")
def with_sigmoid(tiny_data, tmp_path_factory):
    """A third-party checkpoint of a network trained with a sigmoid after the Generator."""
    folder = tmp_path_factory.mktemp("sigmoid")
    assert in_process(Trainer.main, "--DR", tiny_data, "--save_root", folder, *TINY,
                      "--output", "sigmoid", "--num_epoch", 4, "--lr", 0.01) == 0
    weights = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    torch.save({"state_dict": weights}, folder / "third.ckpt")
    return folder / "third.ckpt"


@pytest.mark.parametrize("main", [Trainer.main, Tester.main])
def test_a_sigmoid_network_asks_to_be_tested_with_one(
        main, with_sigmoid, tiny_data, tmp_path, capsys):
    flags = ["--DR", tiny_data, "--save_root", tmp_path / "out", "--ckpt_path", with_sigmoid,
             *TINY, "--test"]
    assert in_process(main, *flags) == 0
    assert capsys.readouterr().out.count("--output sigmoid") == 1
    assert in_process(main, *flags, "--output", "sigmoid") == 0
    assert "expected --output sigmoid" not in capsys.readouterr().out


def test_a_network_trained_without_is_not(tiny_data, tiny_run, tmp_path, capsys):
    for main in (Trainer.main, Tester.main):
        assert in_process(main, "--DR", tiny_data, "--save_root", tmp_path / "out", "--ckpt_path",
                          tiny_run / "best.ckpt", *TINY, "--test") == 0
    assert "sigmoid" not in capsys.readouterr().out


def test_what_counts_as_trained_with_a_sigmoid():
    """Far outside [0, 1] alone is not enough: a clamp in training lets values run off, too."""
    given = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)).clamp(0.02, 0.98)
    noise = 0.05 * torch.randn(given.shape, generator=torch.Generator().manual_seed(1))
    dark_or_bright = given.round().clamp(0.02, 0.98)
    far_off = (given.round() - 0.5) * 20
    for frames, before, expected in [
            (torch.logit(given) + noise, given, True),              # a sigmoid's network
            (torch.logit(dark_or_bright), dark_or_bright, True),    # high contrast
            (given + noise, given, False),                          # a good network without
            (0.1 + noise, given, False),                            # one that knows nothing yet
            (far_off, given.round(), False),                        # trained with a clamp
            (1e6 * noise, given, False),                            # exploded
            (given * math.nan, given, False)]:
        assert are_logits(frames, before) == expected


@pytest.mark.parametrize(
    "attributes",
    [{}, {"mse_criterion": nn.MSELoss(), "current_epoch": 0, "val_vi_len": 20, "batch_size": 1}],
    ids=["fewest", "the template's"],
)
def test_a_script_that_inherits_more(attributes, template, tiny_data, tmp_path):
    """The networks are its own; load_checkpoint, eval, val_one_step and make_gif are ours."""
    torch.save(template, tmp_path / "wild.ckpt")
    args = bare(
        DR=str(tiny_data), save_root=str(tmp_path / "out"), ckpt_path=str(tmp_path / "wild.ckpt")
    )
    model = NetworksOnly(args, **attributes)
    before = model.eval()  # with the weights it was made with
    model.load_checkpoint()
    assert equal(model, template["state_dict"]) and model.current_epoch == 4
    after = model.eval()
    assert before != after and after == pytest.approx(
        loaded(tmp_path / "wild.ckpt", DR=str(tiny_data), save_root=str(tmp_path / "out")).eval(),
        abs=0.05,
    )  # bf16 rounds by layout
    for img, label in model.val_dataloader():
        loss, psnrs = model.val_one_step(img, label)
        assert len(psnrs) == 19 and float(loss) > 0
    model.make_gif([torch.rand(3, 16, 32)] * 2, str(tmp_path / "own.gif"))
    assert (tmp_path / "own.gif").exists() and (tmp_path / "out").is_dir()


def test_networks_alone_can_be_trained(tiny_data, tmp_path):
    """A step, a checkpoint and a training stage, without our __init__ and our forward."""

    class Overriding(NetworksOnly):
        def forward(self, img, label):
            raise NotImplementedError("nobody calls it")

    model = Overriding(bare(DR=str(tiny_data), save_root=str(tmp_path / "out"), num_epoch=1))
    before = [p.detach().clone() for p in model.parameters()]
    img = torch.rand(2, 4, 3, 16, 32)
    assert math.isfinite(model.training_one_step(img, img, False).item())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    model.save(str(tmp_path / "own.ckpt"))
    model.training_stage()
    assert (tmp_path / "out" / "best.ckpt").exists() and (tmp_path / "own.ckpt").exists()


def test_a_tester_that_inherits_from_ours(template, tiny_data, tmp_path):
    class Mine(Tester.Test_model):
        __init__ = NetworksOnly.__init__

    torch.save(template, tmp_path / "wild.ckpt")
    args = types.SimpleNamespace(
        **vars(
            bare(
                DR=str(tiny_data),
                save_root=str(tmp_path / "out"),
                ckpt_path=str(tmp_path / "wild.ckpt"),
            )
        )
    )
    model = Mine(args)
    model.load_checkpoint()
    assert model.eval().shape == (5, 20, 3, 16, 32)
    assert (tmp_path / "out" / "submission.csv").exists()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_an_annealing_schedule_of_ones_own(tiny_data, tmp_path):
    """In the template's recipe training asks get_beta() and update() alone."""

    class Steps:
        betas = 0.0

        def get_beta(self):
            return self.betas

        def update(self):
            self.betas += 0.25

    flags = ["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--recipe", "template"]
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args(flags))
    model.kl_annealing = Steps()
    model.training_stage()
    assert [row["beta"] for row in model.state.history] == [0, 0.25]


def test_an_epoch_may_be_set_before_the_flags():
    class EpochFirst(Trainer.VAE_Model):
        def __init__(self, args):
            super(Trainer.VAE_Model, self).__init__()
            self.current_epoch = 3
            self.args = args

    model = EpochFirst(bare())
    assert model.current_epoch == 3 and model.tfr == 1.0
