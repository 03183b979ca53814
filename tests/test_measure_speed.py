"""What measure_speed counts and computes. No test here looks at how long something takes."""

import json

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
    """It goes on only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        """A function whose calls take so many seconds, one after the other and then from the beginning."""
        left = []

        def run():
            left.extend([] if left else seconds)
            self.now += left.pop(0)

        return run


def test_a_round_runs_each_once():
    clock, order = FakeClock(), []
    works = {"a": clock.work(1, 3, 2), "b": clock.work(4)}
    runs = {name: lambda name=name: (order.append(name), works[name]()) for name in works}
    assert measure_speed.interleave(runs, rounds=3, clock=clock) == {"a": [1, 3, 2], "b": [4, 4, 4]}
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 2), (10, 2), (11, 3), (25, 5)])
def test_rounds_go_on_until_the_time_is_up(seconds, rounds):
    clock = FakeClock()
    taken = measure_speed.interleave({"a": clock.work(5)}, rounds=2, seconds=seconds, clock=clock)
    assert taken == {"a": [5] * rounds}


def test_ratios_are_those_of_the_same_round():
    """A machine that slows down for a round slows down both."""
    ratio = measure_speed.compare([10, 1, 30], [5, 0.5, 10])
    assert ratio == {"median": 2, "min": 2, "max": 3}


def test_a_convolution_is_counted():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    assert measure_speed.count_operations(lambda: conv(torch.randn(2, 3, 8, 8))) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


def count_forward_and_backward(layer):
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    forward = measure_speed.count_operations(lambda: layer(x))
    return forward, measure_speed.count_operations(lambda: layer(x).sum().backward()) - forward


def test_fused_attention_counts_as_attention_by_hand():
    """And, backwards, for one product more: the scores, which it has not kept."""
    fused = measure_speed.lesson2.MultiHeadSelfAttention(16, heads=2)
    by_hand = measure_speed.lesson2.ExplicitSelfAttention(16, heads=2)
    forward, backward = count_forward_and_backward(fused)
    forward_by_hand, backward_by_hand = count_forward_and_backward(by_hand)
    scores = 2 * 2 * 2 * 16**2 * 8  # multiply and add; images; heads; pixels asking and asked; channels of a head
    assert forward == forward_by_hand == 2 * (2 * 16 * 16 * (3 * 16 + 16)) + 2 * scores
    assert backward == backward_by_hand + scores


def test_memory_is_what_is_held_at_a_time():
    def work():
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(5000)  # given back at once
        return kept

    kept, most = measure_speed.track_memory(work, CPU)
    assert kept.shape == (1000,)
    assert most == 4 * 6000


@pytest.mark.parametrize("network_class", [measure_speed.TimeUNet, measure_speed.CondUNet])
def test_competitors_have_the_same_structure(network_class, tiny, lesson3):
    """As many parameters and operations; and in attention by hand there is no fused attention left."""
    counts = {}
    for kind in ("ours", "by hand", "diffusers"):
        competitor = measure_speed.Competitor(kind, network_class, tiny)
        denoiser = competitor.make_denoiser(CPU)
        x, sigma = torch.randn(2, 1, 28, 28), torch.ones(2)
        label = torch.tensor([0, 10])
        operations = measure_speed.count_operations(lambda: denoiser(x, sigma, label))  # noqa: B023
        counts[kind] = sum(parameter.numel() for parameter in denoiser.parameters()), operations
    assert counts["ours"] == counts["by hand"] == counts["diffusers"]


def test_two_evaluations_have_guidance_where_half_of_18_have(lesson3, lesson4):
    for evaluations in (2, 18):
        guided = [sigma <= lesson4.GUIDED_BELOW for sigma in lesson3.noise_levels(evaluations)[:-1]]
        assert 2 * sum(guided) == evaluations


def test_json_is_all_there_is_on_stdout(tiny, monkeypatch, capsys):
    def make_tables(device, precisions, batch_size):
        training = list(measure_speed.training_tasks(measure_speed.CondUNet, tiny, [None], steps=1))
        yield measure_speed.Table("training", training, batch_size, 0)
        ours = measure_speed.Competitor("ours", measure_speed.CondUNet, tiny)
        yield measure_speed.Table("sampling", [measure_speed.sampling_task(ours, 18, 0.5, measured=2)], 3, 0)

    monkeypatch.setattr(measure_speed, "make_tables", make_tables)
    measure_speed.main(["--json", "--device", "cpu", "--rounds", "2", "--batch-size", "4"])
    found = json.loads(capsys.readouterr().out)
    assert "torch" in found["machine"]
    names = [row["name"] for row in found["tables"]["training"]]
    assert names == ["diffusers, float32", "by hand, float32", "ours, float32", "ours, float32, Muon"]
    for row in found["tables"]["training"] + found["tables"]["sampling"]:
        assert row["rounds"] == 2
        assert row["images_per_second"]["median"] > 0
        assert row["memory_bytes"] > 0
        assert row["share_of_peak"] > 0
    theirs, _, ours, muon = found["tables"]["training"]
    assert theirs["times_first"] == {"median": 1, "min": 1, "max": 1}
    assert theirs["operations_per_image"] == ours["operations_per_image"]
    assert ours["times_first"] == ours["times_diffusers"]
    assert muon["operations_per_image"] == ours["operations_per_image"]  # the optimiser's are no image's


def test_growth(tiny, monkeypatch, capsys):
    nets = [(tiny, measure_speed.PRESETS[tiny], size) for size in (28, 56)]
    monkeypatch.setattr(measure_speed, "growth_nets", lambda: nets)
    measure_speed.main(["--growth", "--json", "--device", "cpu"])
    (rows,) = json.loads(capsys.readouterr().out)["tables"].values()
    small, large = rows
    assert small["parameters"] == large["parameters"]
    assert 4 < large["multiply_adds"] / small["multiply_adds"] < 16  # attention grows with the square of the pixels
    assert large["kept_bytes"] / small["kept_bytes"] == pytest.approx(4, rel=0.1)


def test_every_network_of_the_growth_table_can_be_made():
    for name, preset, _ in measure_speed.growth_nets():
        network = measure_speed.CondUNet.from_preset(preset, 10)
        assert network.attends == {*preset.attention_levels, "middle"}, name
