"""CUDA graphs without a GPU: what a recording read is still there when it is replayed."""

import weakref
from functools import partial

import pytest
import torch
from conftest import TINY, in_process, send_at

import Trainer
from scripts.kill_test import differences
from utils import graphs
from utils.averaging import network_state
from utils.checkpoint import NETWORKS
from utils.compiling import compile_networks, is_compiled


class Recording:
    """Stand in for a graph: call the function, after a look at the memory that it reads by address.

    A real one would read and write memory that belongs to others meanwhile.
    """

    made = []

    def __init__(self, function, *inputs):
        self.inputs, self.function, self.replays = [x.clone() for x in inputs], function, 0
        self.before, self.rates = self.addresses(), []
        self.made.append(self)

    def addresses(self):
        optimizer = getattr(getattr(self.function, "__self__", None), "given", [None])[0]
        if optimizer is None:  # a rollout's
            return []
        tensors = [x for state in optimizer.state.values() for x in state.values()]
        return [x.data_ptr() for x in [*tensors, *optimizer.param_groups[0]["params"]]]

    def __call__(self, *inputs):
        assert self.addresses() == self.before
        assert [x.shape for x in inputs] == [x.shape for x in self.inputs]
        torch._foreach_copy_(self.inputs, list(inputs))
        self.replays += 1
        if self.before:
            self.rates.append(float(inputs[0]))
        return self.function(*self.inputs)


@pytest.fixture
def recordings(monkeypatch):
    """Have a CPU record; returns the recordings of optimizer steps and of rollouts so far."""
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setattr(graphs, "Graph", Recording)
    monkeypatch.setattr(graphs, "can_record", lambda device: True)
    monkeypatch.setattr(graphs, "recorded", lambda record: record())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda networks, inputs: None)
    monkeypatch.setattr(graphs, "with_networks", weakref.WeakSet())

    def made():
        return ([x for x in Recording.made if x.before],
                [x for x in Recording.made if not x.before])
    return made


def train(data, folder, *flags):
    return in_process(Trainer.main, "--DR", data, "--save_root", folder, *TINY, *flags)


def weights(folder):
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    return torch.cat([x.flatten().double() for x in saved["train_state_dict"].values()])


def test_replayed_training_is_the_same(tiny_data, tmp_path, recordings):
    assert train(tiny_data, tmp_path / "plain", "--no-cuda_graphs") == 0
    assert recordings() == ([], [])
    assert train(tiny_data, tmp_path / "graphs") == 0
    (step,), rollouts = recordings()
    assert step.replays > 20 and len(set(step.rates)) == step.replays  # every step's own rate
    assert rollouts and all(x.replays == 17 for x in rollouts)
    assert torch.equal(weights(tmp_path / "graphs"), weights(tmp_path / "plain"))


def test_another_optimizer_state_is_recorded_anew(tiny_data, tmp_path, recordings):
    """--max_minutes tries steps and takes them back, and so does a resume."""
    flags = "--max_minutes", "60"
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, "training_one_step", 30, 15)
        assert train(tiny_data, tmp_path, *flags) == 143
    tried, trained = recordings()[0]
    assert tried.replays > 5 and trained.replays > 5
    assert train(tiny_data, tmp_path, *flags, "--resume") == 0
    assert len(recordings()[0]) > 2


def test_compiled_networks_are_recorded_and_rollouts_are_graphs(recordings, monkeypatch):
    """What a graph was recorded of must not be called again, nor compiled again."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, seen = Trainer.VAE_Model(Trainer.build_parser().parse_args(TINY)), []
    compile_networks(model, rollouts=False)

    def record(networks, inputs):
        seen.append(is_compiled(model))
        assert len(networks) == len(inputs) == len(NETWORKS)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    before = network_state(model)
    graphs.record_step(model, Trainer.VAE_Model)  # of a model that no training stage has prepared
    assert seen == [True] and not is_compiled(model)
    assert differences(before, network_state(model)) == []
    model.rollout(torch.rand(1, 3, 16, 32), torch.rand(1, 9, 3, 16, 32))
    assert [x.replays for x in recordings()[1]] == [6]


@pytest.fixture
def graphed(recordings, monkeypatch):
    """Return the networks of which graphs were asked so far."""
    seen = []

    def record(networks, inputs):
        # a graph that replays another one can't be recorded
        assert all("forward" not in vars(network) for network in networks)
        seen.extend(networks)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return seen


class OwnStep(Trainer.VAE_Model):
    """Stand for a step with code of its own."""

    def training_one_step(self, *batch):
        return super().training_one_step(*batch)


def test_a_step_that_a_user_changed_is_not_recorded(graphed):
    args = Trainer.build_parser().parse_args(TINY)
    hooked, inside, behind, patched = (Trainer.VAE_Model(args) for _ in range(4))
    own = patched.Generator.forward = lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    hooked.Generator.register_forward_hook(lambda *_: None)
    inside.Generator[0].register_forward_pre_hook(lambda *_: None)
    behind.Generator.register_full_backward_hook(lambda *_: None)
    for model in (hooked, inside, behind, patched, OwnStep(args)):
        graphs.record_step(model, Trainer.VAE_Model)
        assert graphed == [] and model not in graphs.with_networks
    assert patched.Generator.forward is own


def test_a_model_is_recorded_anew(graphed):
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args(TINY))
    for times in (1, 2):
        graphs.record_step(model, Trainer.VAE_Model)
        assert len(graphed) == times * len(NETWORKS) and model in graphs.with_networks


def test_an_edited_step_that_calls_a_network_twice_is_not_recorded(graphed, monkeypatch, capsys):
    decode = Trainer.VAE_Model.decode
    monkeypatch.setattr(Trainer.VAE_Model, "decode", lambda model, *given: (
        decode(model, *given) + decode(model, *given)) / 2)
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args(TINY))
    graphs.record_step(model, Trainer.VAE_Model)
    assert graphed == [] and "calls a network twice" in capsys.readouterr().out


def test_windows_of_several_sizes_are_not_recorded(tiny_data, tmp_path, recordings):
    assert train(tiny_data, tmp_path, "--recipe", "template", "--num_epoch", "1") == 0
    assert recordings()[0] == []


def test_a_next_frame_of_another_kind_is_called_every_time(recordings):
    class Counting(Trainer.VAE_Model):
        calls = 0

        def next_frame(self, *inputs):
            self.calls += 1
            return super().next_frame(*inputs)

    first, label = torch.rand(1, 3, 16, 32), torch.rand(1, 9, 3, 16, 32)
    args = Trainer.build_parser().parse_args(TINY)
    model = Counting(args)
    model.rollout(first, label)
    assert model.calls == 8 and recordings()[1] == []
    model = Trainer.VAE_Model(args)
    model.rollout(first, label)
    assert [x.replays for x in recordings()[1]] == [6]
    seen = []
    model.Generator.register_forward_hook(lambda *_: seen.append(1))
    model.rollout(first, label)
    assert len(seen) == 8 and len(recordings()[1]) == 1
