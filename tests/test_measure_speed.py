"""What measure_speed counts and computes. No test here looks at how long something takes."""

import itertools

import measure_speed
import pytest
import torch
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture
def tiny(lesson3, monkeypatch):
    """The name of a preset that is small enough for tests."""
    preset = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=4, head_dim=8)
    monkeypatch.setitem(lesson3.PRESETS, "tiny", preset)
    return "tiny"


class FakeClock:
    """It goes on only when a function works: work(1, 2) is one whose calls take 1, 2, 1, 2, ... seconds."""

    now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        left = itertools.cycle(seconds)
        return lambda *_: setattr(self, "now", self.now + next(left))


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 2), (18, 2), (19, 3), (30, 4)])
def test_a_round_runs_each_once_and_rounds_go_on_until_the_time_is_up(seconds, rounds):
    clock = FakeClock()
    runs = {"a": clock.work(1, 3, 2), "b": clock.work(7)}
    taken = measure_speed.interleave(runs, rounds=2, seconds=seconds, clock=clock)
    assert taken == {"a": [1, 3, 2, 1][:rounds], "b": [7] * rounds}


def test_ratios_are_those_of_the_same_round():
    """A machine that slows down for a round slows down both."""
    assert measure_speed.compare([10, 1, 30], [5, 0.5, 10]) == (2, 2, 3)


def test_the_share_of_the_optimisers():
    clock = FakeClock()
    other = clock.work(5)
    optimizer = type("Slow", (torch.optim.SGD,), {"step": clock.work(1, 2)})([nn.Parameter(torch.zeros(1))])
    share = measure_speed.optimizer_share(lambda: (other(), optimizer.step(), optimizer.step(), other()), CPU, clock)
    assert share == pytest.approx(3 / 13)
    assert measure_speed.optimizer_share(other, CPU, clock) == 0


def test_a_convolution_is_counted_and_fused_attention_as_attention_by_hand():
    """And, backwards, for one product more: the scores, which it has not kept."""
    counts = []
    for attention_fn in (measure_speed.lesson2.fused_attention, measure_speed.lesson2.attention):
        layer = measure_speed.lesson2.AttentionBlock(16, heads=2, attention_fn=attention_fn)
        layers, x, y = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), layer), torch.randn(2, 3, 4, 4), []
        forward = measure_speed.count_operations(lambda: y.append(layers(x.requires_grad_())))  # noqa: B023
        counts.append((forward, measure_speed.count_operations(lambda: y[0].sum().backward())))  # noqa: B023
    scores = 2 * 2 * 2 * 16**2 * 8  # multiply and add; images; heads; pixels asking and asked; channels of a head
    layer_by_layer = 2 * (2 * 16) * 16 * (3 * 9 + 3 * 16 + 16)  # multiply and add; pixels; channels out, and in
    (forward, backward), (forward_by_hand, backward_by_hand) = counts
    assert forward == forward_by_hand == layer_by_layer + 2 * scores
    assert backward == backward_by_hand + scores


@pytest.mark.parametrize("make_network", [measure_speed.TIMED, measure_speed.CONDITIONAL], ids=["time", "label"])
def test_competitors_have_the_same_structure_and_the_batches_of_their_lesson(make_network, tiny, lesson3, monkeypatch):
    """As many parameters and operations; and only in attention by hand is there attention by hand. In training, one
    label in ten is dropped if the network has labels."""
    by_hand, attention, counts = [], measure_speed.lesson2.attention, set()
    monkeypatch.setattr(measure_speed.lesson2, "attention", lambda *qkv: by_hand.append(kind) or attention(*qkv))
    for kind in ("ours", "by hand", "diffusers"):
        denoiser = measure_speed.Competitor(kind, make_network, tiny).make_denoiser(CPU)
        x = torch.randn(2, 1, 28, 28), torch.ones(2), torch.tensor([0, 9])
        operations = measure_speed.count_operations(lambda: denoiser(*x))  # noqa: B023
        counts.add((sum(parameter.numel() for parameter in denoiser.parameters()), operations))
    assert len(counts) == 1
    assert set(by_hand) == ({"by hand"} if make_network is measure_speed.CONDITIONAL else set())

    labels, loss = [], lesson3.denoising_loss
    monkeypatch.setattr(lesson3, "denoising_loss", lambda *parts: labels.append(parts[4]) or loss(*parts))
    measure_speed.start_training(measure_speed.Competitor("ours", make_network, tiny), CPU, 64)()
    assert [10 in label for label in labels] == [make_network is measure_speed.CONDITIONAL]


def test_training_and_sampling_are_measured(tiny, lesson3, lesson4):
    """Two steps of sampling stand for all: half of them have guidance."""
    training = list(measure_speed.training_tasks(measure_speed.CONDITIONAL, tiny, [None], steps=1))
    sampling = measure_speed.sampling_task(training[-1].competitor, lesson3.STEPS, 0.5, measured=2)
    rows = measure_speed.measure([*training, sampling], CPU, 2, {None: 1e12}, rounds=1, seconds=0)
    theirs, _, ours, muon, drawn = rows
    assert [row["name"].split(",")[0] for row in rows] == ["diffusers", "by hand", "ours", "ours", "ours"]
    assert theirs["times_first"] == (1, 1, 1)
    assert ours["times_first"] == ours["times_peer"]
    assert theirs["operations"] == ours["operations"] == muon["operations"]  # the optimiser's are no image's
    assert all(row["rate"] > 0 and row["of_peak"] > 0 for row in rows)
    assert muon["optimizer"] > 0 == drawn["optimizer"]
    for steps in (2, lesson3.STEPS):
        guided = [sigma <= lesson4.GUIDED_BELOW for sigma in lesson3.noise_levels(steps)[:-1]]
        assert 2 * sum(guided) == steps


def test_a_round_makes_the_calls_of_a_task(tiny, monkeypatch):
    """And its images a second are those of all its calls."""
    made, competitor = [], measure_speed.Competitor("ours", measure_speed.TIMED, tiny)
    task = measure_speed.Task("", competitor, lambda *_: lambda: made.append(0), calls=3)
    monkeypatch.setattr(measure_speed, "count_operations", lambda run: 0)
    monkeypatch.setattr(measure_speed, "interleave", lambda runs, *_: {name: [0.5] for name in runs})
    monkeypatch.setattr(measure_speed, "optimizer_share", lambda run, device: 0)
    (row,) = measure_speed.measure([task], CPU, 10, {None: 1}, 1, 0)
    assert len(made) == 3  # to start up
    assert row["rate"] == 10 * 3 / 0.5


def test_the_tables(monkeypatch, capsys):
    """All that is to be measured, and how it is printed."""
    row = {"rate": 1.5, "operations": 3e9, "of_peak": 0.4, "optimizer": 0.05}
    row |= {"times_first": (1, 1, 1), "times_peer": None}
    monkeypatch.setattr(measure_speed, "measure", lambda tasks, *_: [row | {"name": task.name} for task in tasks])
    monkeypatch.setattr(measure_speed, "measure_machine", lambda *_: 1e9)
    monkeypatch.setattr(measure_speed.tools, "choose_precision", lambda device: torch.bfloat16)
    for name, value in measure_speed.LIMITS.items():
        monkeypatch.setenv(name, value)  # else it would begin again, with them
    monkeypatch.setattr(measure_speed.subprocess, "run", lambda command, check: measure_speed.main(command[2:]))
    measure_speed.main(["--device", "cpu"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "(1.00 to 1.00)" in line]
    assert len(lines) == 5 + 6 + 6 + 11 + 4  # the last, with limits, in float32 alone
    assert all(line[-3:] == ["3.00", "40%", "5.0%"] for line in lines)


def test_growth(tiny, lesson4):
    costs = [measure_speed.measure_cost(tiny, measure_speed.PRESETS[tiny], size, CPU, None, 1e7) for size in (28, 56)]
    parameters, operations, kept, _, batch_size = zip(*costs, strict=True)
    assert parameters[0] == parameters[1]
    assert 4 < operations[1] / operations[0] < 16  # attention grows with the square of the pixels
    assert kept[1] / kept[0] == pytest.approx(4, rel=0.1)
    assert batch_size == tuple(round(1e7 / each) for each in operations)
    for name, preset, _ in measure_speed.growth_nets():
        with torch.device("meta"):
            network = lesson4.make_network(preset, 10)
        kinds = [type(layer) for layer in network.modules()]
        expected = 1 + (2 * preset.depth + 1) * len(preset.attention_levels)
        assert kinds.count(measure_speed.lesson2.MultiHeadSelfAttention) == expected, name
