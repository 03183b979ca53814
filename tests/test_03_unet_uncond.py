"""Lesson 3: the U-Net and its parts, the denoiser, the samplers against closed forms, training."""

import argparse
import copy
import importlib
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def noisy(n, channels, height, width):
    return torch.randn(n, channels, height, width)


@pytest.fixture
def time_unet(lesson3, redraw):
    return redraw(lesson3.TimeUNet(2, (8, 16, 24), 1, 4))


# The network
@pytest.mark.parametrize(("widths", "depth", "groups"), [((8,), 1, 4), ((8, 16), 2, 2), ((12, 8, 16), 1, 4)])
@pytest.mark.parametrize("with_time", [False, True])
def test_shapes(lesson3, widths, depth, groups, with_time):
    network = (lesson3.TimeUNet if with_time else lesson3.UNet)(3, widths, depth, groups)
    step = 2 ** (len(widths) - 1)
    for n, height, width in ((1, step, step), (3, 2 * step, 3 * step)):
        assert network(noisy(n, 3, height, width), torch.rand(n)).shape == (n, 3, height, width)


def test_a_new_network_is_silent_and_each_branch_too(lesson3):
    assert not lesson3.UNet(1, (8, 16), 1, 4)(noisy(2, 1, 8, 8)).any()
    block, x = lesson3.TimeResBlock(8, 8, 4, 12), noisy(2, 8, 6, 6)
    torch.testing.assert_close(block(x, torch.randn(2, 12)), x)


def test_a_size_that_cannot_be_halved_is_refused(lesson3):
    network = lesson3.UNet(1, (8, 8, 8), 1, 4)
    with pytest.raises(ValueError, match="multiples of 4, got 8 × 6"):
        network(noisy(1, 1, 8, 6))


def test_time_is_needed_and_must_be_a_vector(time_unet):
    for time in (None, torch.rand(2, 1), torch.tensor(0.5)):
        with pytest.raises((ValueError, AttributeError)):
            time_unet(noisy(2, 2, 8, 8), time)


def test_time_changes_the_output_of_its_own_image_only(time_unet):
    x, time = noisy(2, 2, 8, 8), torch.tensor([10.0, -300.0])
    before, after = time_unet(x, time), time_unet(x, time + torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_images_of_a_batch_do_not_touch_each_other(time_unet):
    x, time = noisy(3, 2, 8, 8), torch.randn(3) * 100
    whole = time_unet(x, time)
    alone = torch.cat([time_unet(x[i : i + 1], time[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_scale_and_shift_act_after_the_second_norm(lesson3, redraw):
    """A scale common to all channels would be lost in front of a group norm; here it must reach the output."""
    block = redraw(lesson3.TimeResBlock(8, 8, 1, 4))
    nn.init.zeros_(block.scale_shift.weight)
    x, outputs = noisy(2, 8, 6, 6), []
    for scale in (0.0, 1.0):
        with torch.no_grad():
            block.scale_shift.bias.copy_(torch.tensor([scale] * 8 + [0.0] * 8))
        outputs.append(block(x, torch.randn(2, 4)))
    assert (outputs[0] - outputs[1]).abs().mean() > 0.1


def test_groups_see_one_image_and_one_group(lesson3, redraw):
    """Adding a constant to a group's input channels changes nothing behind its norm."""
    layer = redraw(lesson3.PreActConv(8, 8, 2))
    x = noisy(2, 8, 6, 6)
    raised = x.clone()
    raised[:, :4] += 3
    torch.testing.assert_close(layer(x), layer(raised), rtol=1e-4, atol=1e-5)


# Skips
def saved_layers(lesson3, network):
    return [(name, module) for name, module in network.named_modules() if isinstance(module, lesson3.Saved)]


def test_every_block_of_the_down_path_is_saved(lesson3, time_unet):
    names = [name for name, _ in saved_layers(lesson3, time_unet)]
    assert names == ["conv_in", *(f"down.{i}" for i in range(5))]  # 3 levels, one block each, two convolutions between


@pytest.mark.parametrize("number", range(6))
def test_each_skip_matters(lesson3, time_unet, number):
    """A saved activation that is changed, but not what flows on down, changes the output."""
    layer = saved_layers(lesson3, time_unet)[number][1]
    x, time = noisy(2, 2, 8, 8), torch.randn(2) * 100
    before = time_unet(x, time)
    take = layer.take
    layer.take = lambda: take() * 1.1
    after = time_unet(x, time)
    assert (before - after).abs().max() > 1e-3


def test_no_saved_activation_outlives_the_pass(lesson3, time_unet):
    kept = []
    for _, layer in saved_layers(lesson3, time_unet):
        layer.register_forward_hook(lambda module, inputs, output: kept.append(module.saved is output))
    time_unet(noisy(2, 2, 8, 8), torch.rand(2))
    assert kept == [True] * 6
    assert all(layer.saved is None for _, layer in saved_layers(lesson3, time_unet))


def test_no_saved_activation_outlives_a_pass_that_fails(lesson3, time_unet):
    def fail(*_):
        raise RuntimeError("out of memory")

    time_unet.down[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        time_unet(noisy(2, 2, 8, 8), torch.rand(2))
    assert all(layer.saved is None for _, layer in saved_layers(lesson3, time_unet))


def test_saved_in_front_of_a_class_changes_nothing_but_saves(lesson3):
    conv = lesson3.SavedConv(2, 3, 3)
    x = noisy(1, 2, 5, 5)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias))
    torch.testing.assert_close(conv.take(), conv(x))
    assert conv.take() is not None  # saved anew by the call above
    assert conv.take() is None


# Noise and the denoiser
def test_preconditioning_gives_unit_variance_and_the_right_target(lesson3):
    """Whatever sigma: the network's input and the target it is trained to give have variance one."""
    sigma_data = 0.7
    denoiser = lesson3.Denoiser(None, sigma_data)
    x0, noise = sigma_data * torch.randn(2, 200_000, dtype=torch.float64)
    noise /= sigma_data
    for sigma in (0.02, 0.3, 0.7, 5.0, 80.0):
        c_skip, c_out, c_in = denoiser.scales(torch.tensor(sigma, dtype=torch.float64))
        x = x0 + sigma * noise
        target = (x0 - c_skip * x) / c_out
        assert (c_in * x).std() == pytest.approx(1, abs=0.01)
        assert target.std() == pytest.approx(1, abs=0.01)
        # and c_skip is the one that makes c_out, the amplification of the network's errors, smallest
        assert c_out**2 == pytest.approx((sigma_data * (1 - c_skip)) ** 2 + (c_skip * sigma) ** 2)


class Perfect(nn.Module):
    """A network that gives the exact target, which it is told."""

    def __init__(self, denoiser_scales, x0, x, sigma):
        super().__init__()
        c_skip, c_out, _ = denoiser_scales(sigma.view(-1, 1, 1, 1))
        self.target = (x0 - c_skip * x) / c_out

    def forward(self, x, time, label):
        return nn.functional.pixel_unshuffle(self.target, self.patch) if self.patch > 1 else self.target


@pytest.mark.parametrize("patch", [1, 2])
def test_the_denoiser_of_a_perfect_network_is_exact(lesson3, patch):
    x0, noise, sigma = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0.05, 1.0, 30.0])
    denoiser = lesson3.Denoiser(None, 0.6, patch)
    denoiser.network = Perfect(denoiser.scales, x0, x0 + sigma.view(-1, 1, 1, 1) * noise, sigma)
    denoiser.network.patch = patch
    torch.testing.assert_close(denoiser(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma), x0, rtol=1e-3, atol=1e-4)
    assert lesson3.denoising_loss(denoiser, x0, sigma, noise).max() < 1e-6


def test_the_loss_of_a_silent_network_is_one_at_every_sigma(lesson3):
    denoiser = lesson3.Denoiser(lesson3.TimeUNet(1, (8,), 1, 4), sigma_data=1.0)
    for sigma in (0.05, 1.0, 20.0):
        x0, noise = torch.randn(2, 64, 1, 16, 16)
        loss = lesson3.denoising_loss(denoiser, x0, torch.full((64,), sigma), noise).detach()
        assert loss.shape == (64,)
        assert loss.mean() == pytest.approx(1, abs=0.03)


def test_the_loss_is_the_error_of_the_network_itself(lesson3, time_unet):
    denoiser = lesson3.Denoiser(time_unet, 0.5)
    x0, noise, sigma = noisy(2, 2, 8, 8), noisy(2, 2, 8, 8), torch.tensor([0.1, 3.0])
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    c_skip, c_out, c_in = denoiser.scales(sigma.view(-1, 1, 1, 1))
    output = time_unet(c_in * x, lesson3.lesson1.TIME_SCALE * sigma.log() / 4)
    expected = (output - (x0 - c_skip * x) / c_out).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(lesson3.denoising_loss(denoiser, x0, sigma, noise), expected, rtol=1e-3, atol=1e-5)


# Samplers
def run_sampler(lesson3, denoise, noise, sigmas, method):
    states = list(lesson3.sample(denoise, noise, sigmas, method))
    assert [sigma for sigma, _, _ in states] == [*sigmas[:-1], 0.0]
    return states


@pytest.mark.parametrize("method", ["ddim", "dpm++", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_single_point_is_found_exactly(lesson3, method, steps):
    point = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    noise = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    states = run_sampler(lesson3, lambda x, sigma: point.expand_as(x), noise, lesson3.noise_levels(steps), method)
    torch.testing.assert_close(states[-1][1], point.expand(5, 1, 4, 4), rtol=0, atol=1e-12)
    for sigma, x, _ in states:  # and on the way, x is the point plus the part of the starting noise that is left
        left = sigma / states[0][0] * (states[0][1] - point)
        torch.testing.assert_close(x, point + left, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_the_order_of_each_sampler(lesson3, method, order):
    """Gaussian data of deviation s: the ideal denoiser is linear, and x shrinks as sqrt(sigma² + s²) on its path."""
    s, high, low = 0.6, 20.0, 0.05

    def denoise(x, sigma):
        return x * s**2 / (sigma.view(-1, 1, 1, 1) ** 2 + s**2)

    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    exact = high * noise * math.sqrt((low**2 + s**2) / (high**2 + s**2))
    errors = []
    for steps in (40, 80, 160, 320):
        sigmas = [*np.geomspace(high, low, steps + 1).tolist(), 0.0]
        *_, (sigma, x, _), _ = lesson3.sample(denoise, noise, sigmas, method)
        assert sigma == pytest.approx(low)
        errors.append((x - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.08)


def test_evaluations_are_as_many_as_promised(lesson3):
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return x * 0

    for method, expected in (("ddim", 9), ("dpm++", 9), ("heun", 17)):  # Heun's step to zero needs no second one
        calls.clear()
        list(lesson3.sample(denoise, torch.zeros(1, 1, 2, 2), lesson3.noise_levels(9), method))
        assert len(calls) == expected
        assert all(sigma.shape == (1,) for sigma in calls)


def test_noise_levels_fall_from_end_to_end(lesson3):
    for steps in (1, 2, 18, 100):
        sigmas = lesson3.noise_levels(steps)
        assert len(sigmas) == steps + 1
        assert all(high > low for high, low in pairwise(sigmas))
        assert sigmas[-1] == 0
        assert sigmas[0] == pytest.approx(lesson3.SIGMA_MAX)
        assert steps == 1 or sigmas[-2] == pytest.approx(lesson3.SIGMA_MIN)


def test_an_unknown_sampler_is_refused(lesson3):
    with pytest.raises(ValueError, match="ddim"):
        next(lesson3.sample(lambda x, sigma: x, torch.zeros(1, 1, 2, 2), [1.0, 0.0], "euler"))


def test_starting_noise_depends_on_its_numbers_alone(lesson3):
    noise = lesson3.starting_noise(1, 2, 3, (1, 4, 4))
    torch.testing.assert_close(noise, lesson3.starting_noise(1, 2, 3, (1, 4, 4)), rtol=0, atol=0)
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)):
        assert not torch.equal(noise, lesson3.starting_noise(*other, (1, 4, 4)))
    many = torch.stack([lesson3.starting_noise(0, 0, i, (1, 8, 8)) for i in range(300)])
    assert many.mean().abs() < 0.03
    assert many.std() == pytest.approx(1, abs=0.03)


# Training
def tiny_training(lesson3, seed=0, start=0, steps=30, state=None, until=None):
    """Train a tiny network on two flat pictures; returns its losses and the state at the end."""
    torch.manual_seed(seed)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[1, :, 2:6, 2:6] = 200
    denoiser = lesson3.Denoiser(lesson3.TimeUNet(1, (8, 8), 1, 4), 0.5)
    average = copy.deepcopy(denoiser)
    optimizers = lesson3.make_optimizers(denoiser, peak=5e-3)
    parts = (denoiser, average, *optimizers)
    if state:
        for part, content in zip(parts, state, strict=True):
            part.load_state_dict(copy.deepcopy(content))
    losses = []
    for step, loss in lesson3.train(
        denoiser, average, optimizers, images, torch.tensor([0, 1]), start, steps, 16, seed
    ):
        assert step == start + len(losses)
        losses.append(loss.item())
        if step + 1 == until:
            break
    return losses, [part.state_dict() for part in parts]


def test_training_lowers_the_loss(lesson3):
    losses, _ = tiny_training(lesson3, steps=60)
    assert np.mean(losses[-15:]) < 0.6 * np.mean(losses[:5])


def test_a_resumed_run_is_the_run_that_was_not_interrupted(lesson3):
    whole, end = tiny_training(lesson3)
    first, middle = tiny_training(lesson3, until=11)
    second, resumed = tiny_training(lesson3, start=11, state=middle)
    np.testing.assert_allclose(first + second, whole, rtol=1e-6)
    for name, weight in end[1].items():
        torch.testing.assert_close(resumed[1][name], weight, rtol=1e-5, atol=1e-7)


def test_batches_are_a_function_of_seed_and_step(lesson3):
    images, labels = torch.arange(40).to(torch.uint8).view(40, 1, 1, 1), torch.arange(40)

    def draw(seed, step):
        return lesson3.draw_batch(images, labels, 32, seed, step, lambda label, generator: label)

    same, again = draw(3, 5), draw(3, 5)
    torch.manual_seed(99)
    for one, other in zip(same, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for other in (draw(3, 6), draw(4, 5), draw(5, 3)):
        assert not any(torch.equal(a, b) for a, b in zip(same, other, strict=True))
    x0, sigma, noise, label = same
    torch.testing.assert_close(x0.flatten(), label / 127.5 - 1)  # a label stays with its image
    assert x0.shape == noise.shape == (32, 1, 1, 1)
    assert sigma.shape == (32,)
    assert (sigma > 0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_a_convolution_equally_far_in_every_direction(lesson3, layout):
    """Whatever the gradient's singular values, the step's are all about the learning rate."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 12, 3, bias=False).to(memory_format=layout)
    before = conv.weight.detach().clone()
    scales = torch.logspace(0, -2, 12)[:, None, None, None]
    conv.weight.grad = (scales * torch.randn_like(before)).contiguous(memory_format=layout)
    lesson3.ConvMuon([conv.weight], lr=0.5, weight_decay=0).step()
    step = (before - conv.weight.detach()).flatten(1).double()
    u, _, v = torch.linalg.svd(conv.weight.grad.flatten(1).double(), full_matrices=False)
    along = u.T @ step @ v.T  # the step in the gradient's own directions: 0.5 on the diagonal, if it were exact
    assert 0.3 < along.diagonal().min() <= along.diagonal().max() < 0.65
    assert (along - along.diagonal().diag()).abs().max() < 0.1


def test_each_parameter_has_one_optimizer(lesson3, lesson4):
    denoiser = lesson3.Denoiser(lesson4.CondUNet.from_preset(lesson3.PRESETS["small"], 10), 0.5)
    muon, adam = lesson3.make_optimizers(denoiser, 1e-3)
    owned = [*muon.weights, *adam.param_groups[0]["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) == set(denoiser.parameters())


def test_shares_of_a_batch_make_up_the_batch(lesson3):
    images, labels = torch.arange(40).to(torch.uint8).view(40, 1, 1, 1), torch.arange(40)

    def draw(share, training_label=lambda label, generator: label):
        return lesson3.draw_batch(images, labels, 12, 3, 5, training_label, share)

    shares = [draw(slice(i, i + 4)) for i in (0, 4, 8)]
    for whole, *parts in zip(draw(slice(None)), *shares, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    assert draw(slice(0, 4), lambda label, generator: None)[3] is None


def test_a_network_that_cannot_be_compiled_is_trained_as_it_is(lesson3, time_unet, monkeypatch, capsys):
    def fail(graph, inputs):
        raise RuntimeError("no such compiler\nand much more about it")

    compile_network = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda network, **how: compile_network(network, backend=fail, **how))
    denoiser, sigma = lesson3.Denoiser(time_unet, 0.5), torch.ones(2)
    x0, noise = noisy(2, 2, 8, 8), noisy(2, 2, 8, 8)
    before = denoiser(x0, sigma)
    lesson3.compile_network(denoiser, (x0, sigma, noise, None))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("compile ")
    assert "no such compiler" in second
    torch.testing.assert_close(denoiser(x0, sigma), before)
    assert all(parameter.grad is None for parameter in denoiser.parameters())


def test_learning_rate_rises_then_falls_to_zero(lesson3):
    for steps in (1, 2, 7, 1000):
        rates = [lesson3.schedule(step, steps) for step in range(steps)]
        top = int(np.argmax(rates))
        assert min(rates) > 0
        assert max(rates) <= 1
        assert top <= 0.05 * steps + 1
        assert all(a > b for a, b in pairwise(rates[top:]))
    assert max(rates) == pytest.approx(1, rel=0.01)
    assert rates[-1] < 0.01


def test_the_average_follows_and_is_smoother(lesson3):
    fast, slow = nn.Linear(1, 1), nn.Linear(1, 1)
    distances = []
    for step in range(400):
        with torch.no_grad():
            for parameter in fast.parameters():
                parameter.fill_(3 + (-1) ** step)
        lesson3.update_average(slow, fast, step)
        distances.append((slow.weight - 3).abs().item())
    assert distances[0] == pytest.approx(1)  # the first weights are taken as they are
    assert distances[-1] < 0.1


# Pictures
def test_grid_puts_images_row_by_row(lesson3):
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 10
    picture = lesson3.lesson1.grid(images, 3)
    assert picture.shape == (4, 9)
    np.testing.assert_allclose(picture[::2, ::3], [[0, 0.1, 0.2], [0.3, 0.4, -1]], rtol=1e-6)


@pytest.mark.parametrize("size", [(28, 28), (27, 31), (1, 1), (64, 30)])
def test_crop_undoes_pad(lesson3, size):
    for preset in lesson3.PRESETS.values():
        images = torch.randint(0, 256, (2, 1, *size), dtype=torch.uint8)
        padded = lesson3.pad(images, preset)
        step = preset.patch * 2 ** (len(preset.widths) - 1)
        for side, wanted in zip(padded.shape[2:], size, strict=True):
            assert side % step == 0
            assert wanted <= side < wanted + step
        torch.testing.assert_close(lesson3.crop(padded, size), images)
        assert padded.sum() == images.sum()


def test_the_lecture_preset_pads_28_to_32_by_two_on_each_side(lesson3):
    padded = lesson3.pad(torch.full((1, 1, 28, 28), 255, dtype=torch.uint8), lesson3.PRESETS["lecture"])
    assert padded.shape == (1, 1, 32, 32)
    assert padded[0, 0, 2:30, 2:30].all()
    assert padded.sum() == 28 * 28 * 255


# The lesson's claims
def test_a_signal_comes_through_if_activations_come_first(lesson3):
    x = torch.randn(8, 16, 14, 14)
    left, growth = {}, {}
    for order in (lesson3.activate_first, lesson3.activate_last):
        states, growth[order] = lesson3.signal_through(order, x)
        assert len(states) == 21
        torch.testing.assert_close(states[0], x)
        left[order] = lesson3.correlation(states[-1], x)
    assert left[lesson3.activate_first] > 0.4
    assert abs(left[lesson3.activate_last]) < 0.15
    assert growth[lesson3.activate_last] > growth[lesson3.activate_first]


def test_correlation_is_that_of_numpy(lesson3):
    a, b = noisy(1, 1, 5, 7), noisy(1, 1, 5, 7)
    expected = np.corrcoef(a.flatten(), b.flatten())[0, 1]
    assert lesson3.correlation(a, 3 * b + 1) == pytest.approx(expected, abs=1e-6)


def test_only_batch_norm_minds_the_other_images(lesson3):
    x = noisy(8, 16, 6, 6)
    assert lesson3.change_by_others(nn.GroupNorm(4, 16), x) == 0
    assert lesson3.change_by_others(nn.BatchNorm2d(16), x) > 0.3


def test_saved_must_stand_in_front(lesson3):
    conv = lesson3.MixedInBehind(2, 3, 3)
    conv(noisy(1, 2, 5, 5))
    assert conv.take() is None


def test_layers_are_counted_right(lesson3):
    network, x = lesson3.UNet(1, (8, 16), 1, 4), noisy(1, 1, 8, 8)
    rows = {name: counts for name, *counts in lesson3.measure_layers(network, x)}
    path = ["down.0", "down.1", "down.2", "middle.0", "middle.1", *(f"up.{i}" for i in range(5))]
    assert list(rows) == ["conv_in", *path, "conv_out"]
    assert sum(parameters for _, parameters, _ in rows.values()) == sum(p.numel() for p in network.parameters())
    assert rows["conv_in"] == [(8, 8, 8), 8 * 9 + 8, 9 * 8 * 64]
    assert rows["down.1"] == [(8, 4, 4), 8 * 8 * 9 + 8, 8 * 8 * 9 * 16]
    assert rows["down.2"][2] == (8 * 16 * 9 + 16 * 16 * 9 + 8 * 16) * 16  # two convolutions and the shortcut
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert sum(operations for *_, operations in rows.values()) == counter.get_total_flops() // 2


def test_skips_help(lesson3):
    images = torch.full((16, 1, 12, 12), -1.0)
    images[:, :, ::3] = torch.linspace(-1, 1, 16).view(16, 1, 1, 1)
    losses = [np.mean(lesson3.train_skips(cut, images, steps=60)[1][-20:]) for cut in (False, True)]
    assert losses[0] < 0.8 * losses[1]


def test_cut_skips_arrive_as_zeros(lesson3, time_unet):
    lesson3.cut_skips(time_unet)
    layer = saved_layers(lesson3, time_unet)[0][1]
    assert not layer(noisy(1, 2, 8, 8)).equal(torch.zeros(1))
    assert not layer.take().any()


def test_the_loss_by_level_is_one_for_a_silent_network(lesson3):
    denoiser = lesson3.Denoiser(lesson3.UNet(4, (8,), 1, 4), 1.0, patch=2)
    images = torch.randn(64, 1, 16, 16)
    losses = lesson3.loss_by_level(denoiser, images)
    assert losses == pytest.approx([1] * len(lesson3.LEVELS), abs=0.05)
    low, high = lesson3.loss_by_level(denoiser, images - 0.5, levels=(0.01, 80))  # the mean counts where noise is high
    assert low == pytest.approx(1, abs=0.05)
    assert high == pytest.approx(1.25, abs=0.05)


@pytest.fixture
def tiny(lesson3, monkeypatch):
    """A run with a network that's quick."""
    preset = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=4, head_dim=8, epochs=0.01, batch_size=8)
    monkeypatch.setitem(lesson3.PRESETS, "small", preset)
    return lesson3.Run("TimeUNet", "small", 0.01, 8, 0, "garments", 100, tuple("0123456789"), (28, 28), 0.65)


def test_sections_that_need_a_trained_network_ask_the_checkpoint(lesson3, tiny, tmp_path, monkeypatch, capsys):
    options = argparse.Namespace(out=tmp_path, data="garments", data_dir=None, device="cpu")
    monkeypatch.setattr(lesson3.lesson, "options", options)
    sections = (lesson3.show_sampling, lesson3.show_few_steps)
    for section in sections:
        lesson3.lesson.run(section)
    assert capsys.readouterr().out.count(f"python 03_unet_uncond.py --out {tmp_path}") == 2
    weights = lesson3.make_denoiser(tiny._replace(seed=1), lesson3.TimeUNet, torch.device("cpu")).state_dict()
    content = {"run": tiny._asdict(), "step": 1, "average": weights}
    lesson3.save_checkpoint(tmp_path / "checkpoint.pt", content)
    denoiser, run = lesson3.load_trained(lesson3.lesson, lesson3.TimeUNet)
    assert run == tiny
    for name, weight in denoiser.state_dict().items():
        torch.testing.assert_close(weight.cpu(), weights[name])
    with pytest.raises(lesson3.NotTrained):
        lesson3.load_trained(lesson3.lesson, lesson3.UNet)
    for section in sections:
        lesson3.lesson.run(section)
    printed = capsys.readouterr().out
    assert "left out" not in printed
    assert "largest difference: 0\n" in printed
    lesson3.PRESETS["small"] = lesson3.PRESETS["small"]._replace(widths=(16, 16))
    with pytest.raises(lesson3.UserError, match="--restart"):
        lesson3.load_trained(lesson3.lesson, lesson3.TimeUNet)


def run_cells(script, folder, changes, monkeypatch):
    """As an editor runs them: one namespace, no __file__, a command line that isn't ours, drawn garments."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(importlib.import_module("01_time_embedding"), "HERE", folder)
    text = (Path(__file__).parent.parent / script).read_text()
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    namespace = {"__name__": "__main__"}
    for cell in re.split(r"^(?=# %%)", text, flags=re.MULTILINE):
        exec(compile(cell, "cell", "exec"), namespace)
    return namespace


CHANGES = {
    "from data import NAMES, DataError, load\n": "from data import NAMES, DataError\n"
    "def load(name, split, folder=None): return __import__('data').load('garments', split)\n",
    "steps=100, batch_size": "steps=2, batch_size",
    "steps=120": "steps=2",
}


def test_every_cell_runs_in_order_and_draws(tmp_path, monkeypatch, capsys):
    changes = CHANGES | {
        "\n\n\nclass UserError": "\nPRESETS['small'] = Preset((8, 16), 1, 4, 2, (1,), 8, 8, 1e-3, 0.01)\n\n"
        "class UserError"
    }
    namespace = run_cells("03_unet_uncond.py", tmp_path, changes, monkeypatch)
    printed = capsys.readouterr().out
    titles = re.findall(r"^(\d+)\. ", printed, flags=re.MULTILINE)
    assert titles == [str(number) for number in range(1, 14) if number not in (10, 11)]  # which define what 12 shows
    assert printed.count("left out") == 2  # the sections that need what the last cell trains
    out = tmp_path / "runs" / "03_unet_uncond"
    assert (out / "checkpoint.pt").exists()
    for show in namespace["lesson"].shows[-2:]:
        namespace["lesson"].run(show)
    assert "left out" not in capsys.readouterr().out
    pictures = sorted((out / "lesson").iterdir())
    assert [path.stem[:2] for path in pictures] == ["01", "05", "06", "07", "09", "12", "13"]
