"""Lesson 3: the U-Net and its parts, the denoiser, the samplers against closed forms, training, and its settings."""

import copy
import math
from itertools import pairwise
from unittest import mock

import export_diffusers
import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import lesson_tools as tools

noisy = torch.randn  # noisy(n, channels, height, width)


@pytest.fixture
def time_unet(lesson3, redraw):
    return redraw(lesson3.TimeUNet(2, (8, 16, 24), 1, 4))


# The network
@pytest.mark.parametrize(("widths", "depth", "groups"), [((8,), 1, 4), ((8, 16), 2, 2), ((12, 8, 16), 1, 4)])
@pytest.mark.parametrize("kind", ["UntimedUNet", "TimeUNet"])
def test_any_size_that_can_be_halved_and_an_output_that_starts_at_zero(lesson3, widths, depth, groups, kind):
    network = getattr(lesson3, kind)(3, widths, depth, groups)
    step = 2 ** (len(widths) - 1)
    for n, height, width in ((1, step, step), (3, 2 * step, 3 * step)):
        result = network(noisy(n, 3, height, width), torch.rand(n))
        assert result.shape == (n, 3, height, width)
        assert not result.any()
    if step > 1:
        with pytest.raises(ValueError, match=f"multiples of {step}, got {step} × {step + 1}"):
            network(noisy(1, 3, step, step + 1), torch.rand(1))
    block, x = lesson3.TimeResBlock(8, 8, 4, 12), noisy(2, 8, 6, 6)
    torch.testing.assert_close(block(x, torch.randn(2, 12)), x)


@pytest.mark.parametrize("out_channels", [8, 12])
def test_a_block_equals_that_of_diffusers(lesson3, redraw, compare, out_channels):
    """So scale and shift act after the second norm, and each norm sees one group of one image."""
    block = redraw(lesson3.TimeResBlock(8, out_channels, 4, 6).double())
    options = {"temb_channels": 6, "groups": 4, "eps": 1e-5, "time_embedding_norm": "scale_shift"}
    twin = ResnetBlock2D(in_channels=8, out_channels=out_channels, **options).double()
    state = export_diffusers.convert({f"middle.0.{name}": tensor for name, tensor in block.state_dict().items()})
    twin.load_state_dict({name.removeprefix("mid_block.resnets.0."): tensor for name, tensor in state.items()})
    x, embedding = noisy(3, 8, 6, 5).double(), torch.randn(3, 6).double()
    compare("diffusers' ResnetBlock2D", block(x, embedding), twin(x, embedding), 1e-12)


# Skips
SAVED = ["conv_in", "down.0.0", "down.1.0", "down.2.0", "downsample.0", "downsample.1"]


def test_everything_on_the_way_down_is_saved_until_it_is_taken(lesson3, time_unet):
    layers, kept = [module for module in time_unet.modules() if isinstance(module, lesson3.Saved)], []
    assert layers == [time_unet.get_submodule(name) for name in SAVED]
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: kept.append(module.saved is output))
    time_unet(noisy(2, 2, 8, 8), torch.rand(2))
    assert kept == [True] * 6
    assert all(layer.saved is None for layer in layers)


def test_saved_in_front_of_a_class_changes_nothing_but_saves(lesson3):
    conv, x = lesson3.SavedConv(2, 3, 3), noisy(1, 2, 5, 5)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias)
    for y in (conv(x), conv.take()):
        torch.testing.assert_close(y, expected)
    assert conv.take() is None
    lesson3.cut_skips(conv)
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(conv.take(), torch.zeros_like(expected))


def test_the_function_saves_too_but_its_copies_share_the_weights(lesson3):
    """The averaged network is a deep copy, so our networks need the mix-in."""
    x = noisy(1, 2, 5, 5)
    for make in (lesson3.SavedConv, lambda *sizes: lesson3.saved(nn.Conv2d(*sizes))):
        conv = make(2, 3, 3)
        expected, twin = nn.functional.conv2d(x, conv.weight, conv.bias), lesson3.zero_(copy.deepcopy(conv))
        torch.testing.assert_close(conv(x), expected)
        torch.testing.assert_close(conv.saved, expected)
        assert bool(twin(x).any()) == (make is not lesson3.SavedConv)


# Noise and the denoiser
def test_the_loss_of_a_new_network_is_one_at_every_sigma(lesson3):
    denoiser = lesson3.Denoiser(lesson3.UntimedUNet(4, (8,), 1, 4), 1.0, patch=2)
    images = noisy(64, 1, 16, 16)
    assert lesson3.loss_by_level(denoiser, images) == pytest.approx([1] * len(lesson3.LEVELS), abs=0.05)
    losses = lesson3.loss_by_level(denoiser, images - 0.5, levels=(0.01, 80))
    assert losses == pytest.approx([1, 1.25], abs=0.05)  # at high noise the mean counts


# Samplers
@pytest.mark.parametrize(("sampler", "order"), [("sample_ddim", 1), ("sample_dpm", 2), ("sample_heun", 2)])
def test_the_order_of_each_sampler(lesson3, sampler, order):
    """On Gaussian data of deviation s, the ideal denoiser is linear, and x is proportional to sqrt(sigma² + s²)."""
    s, high, low, errors = 0.6, 20.0, 0.05, []
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    exact = high * noise * math.sqrt((low**2 + s**2) / (high**2 + s**2))
    for steps in (40, 80, 160, 320):
        sigmas = [*np.geomspace(high, low, steps + 1).tolist(), 0.0]
        states = getattr(lesson3, sampler)(lambda x, sigma: x * s**2 / (sigma**2 + s**2), noise, sigmas)
        *_, (_, x, _), _ = states
        errors.append((x - exact).abs().max().item())
    assert [coarse / fine for coarse, fine in pairwise(errors)] == pytest.approx([2**order] * 3, rel=0.08)


def test_a_number_for_sigma_applies_to_all_images(lesson3, time_unet):
    denoiser, x = lesson3.Denoiser(time_unet.double(), 0.5), noisy(3, 2, 8, 8).double()
    expected = denoiser(x, torch.full((3,), 1.7).double())
    torch.testing.assert_close(denoiser(x, 1.7), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoiser(x, 1.7, torch.tensor([0, 1, 2])), expected, rtol=1e-6, atol=1e-6)  # no effect


def test_samplers_evaluate_the_network_as_often_as_promised(lesson3):
    noise, sigmas = torch.zeros(1, 1, 2, 2), lesson3.noise_levels(9)
    promised = {lesson3.sample_ddim: 9, lesson3.sample_dpm: 9, lesson3.sample_heun: 17}  # Heun's last step takes one
    for sample, expected in promised.items():
        denoise = mock.Mock(return_value=noise)
        list(sample(denoise, noise, sigmas))
        assert len(denoise.call_args_list) == expected


# Training
def draw(lesson3, seed, steps, n=7, batch_size=3):
    images = torch.arange(n).to(torch.uint8).view(n, 1, 1, 1)
    return list(lesson3.draw_batches(images, torch.arange(n), batch_size, seed, steps))


def test_every_image_comes_once_an_epoch(lesson3):
    batches = draw(lesson3, 3, range(14))  # 42 images, 6 epochs: some batches straddle two epochs
    assert [step for step, *_ in batches] == list(range(14))
    labels = torch.cat([label for *_, label in batches])
    torch.testing.assert_close(torch.cat([x0 for _, x0, *_ in batches]).flatten(), labels / 127.5 - 1)
    epochs = labels.view(6, 7).tolist()
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_batches_are_a_function_of_seed_and_step(lesson3):
    whole = draw(lesson3, 3, range(9))
    torch.manual_seed(99)
    torch.testing.assert_close(draw(lesson3, 3, range(4)) + draw(lesson3, 3, range(4, 9)), whole, rtol=0, atol=0)
    (same,), after = draw(lesson3, 3, range(5, 6)), torch.rand(9)
    torch.testing.assert_close(same, whole[5], rtol=0, atol=0)
    for seed, step in ((3, 6), (4, 5), (5, 3)):
        ((_, _, sigma, noise, _),) = draw(lesson3, seed, range(step, step + 1))
        assert not set(sigma.tolist()) & set(same[2].tolist())
        assert not set(noise.flatten().tolist()) & set(same[3].flatten().tolist())
    draw(lesson3, 3, range(5, 6))
    torch.testing.assert_close(torch.rand(9), after)  # and so is what is drawn next, to drop labels
    ((_, _, sigma, noise, _),) = draw(lesson3, 0, range(1), batch_size=20_000)
    for values, mean, std in ((sigma.log(), lesson3.P_MEAN, lesson3.P_STD), (noise, 0, 1)):
        assert (values.mean().item(), values.std().item()) == pytest.approx((mean, std), abs=0.05)


def test_images_must_be_bytes(lesson3):
    batches = lesson3.draw_batches(torch.rand(2, 1, 8, 8), torch.zeros(2), 2, 0, range(1))
    with pytest.raises(ValueError, match=r"must be uint8, from 0 to 255, got torch\.float32"):
        next(batches)


def make_parts(lesson3):
    """A denoiser, its average, and its optimizers."""
    torch.manual_seed(0)
    denoiser = lesson3.Denoiser(lesson3.TimeUNet(1, (8, 8), 1, 4), 0.5)
    return denoiser, copy.deepcopy(denoiser), lesson3.use_muon(denoiser.parameters(), max_lr=5e-3)


def test_training_learns(lesson3):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[1, :, 2:6, 2:6] = 200
    batches = lesson3.draw_batches(images, torch.zeros(2), 16, 0, range(30))
    losses = [loss.item() for _, loss, _ in lesson3.train(*make_parts(lesson3), batches, 30)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_a_step_follows_the_mean_of_the_losses(lesson3):
    denoiser, ema, optimizers = make_parts(lesson3)
    twin, sigma = copy.deepcopy(denoiser), torch.tensor([0.02, 0.5, 3.0, 70.0])
    x0, noise = noisy(2, 4, 1, 8, 8)
    ((_, loss, norm),) = lesson3.train(denoiser, ema, optimizers, [(0, x0, sigma, noise, None)], 1)
    losses = lesson3.denoising_loss(twin, x0, sigma, noise)
    losses.mean().backward()
    torch.testing.assert_close(loss, losses.mean())
    torch.testing.assert_close(norm, torch.stack([p.grad.norm() for p in twin.parameters()]).norm())
    torch.testing.assert_close(ema.state_dict(), denoiser.state_dict())  # the first weights are taken as they are


def newton_schulz(x):
    """The plain iteration for one matrix: five times X <- a X + (b G + c G²) X with G = X Xᵀ, in float64."""
    x = x.double() / (x.double().norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_orthogonalize_is_the_plain_iteration(lesson3):
    steep = torch.logspace(0, -6, 24)
    cases = [[torch.randn(n, columns) for columns in (n, n + 1, 9 * n)] for n in (1, 8, 24, 48)]
    cases += [[torch.randn(7, 7), torch.randn(7, 20), torch.randn(20, 7)], [torch.randn(9, 1)]]
    cases += [[torch.randn(24, 24) @ steep.diag() @ torch.randn(24, columns) for columns in (24, 90)]]
    cases += [[torch.randn(6, 1) @ torch.randn(1, 20), torch.zeros(6, 10), 1e-4 * torch.randn(6, 10)]]
    for matrices in cases:
        for ours, matrix in zip(lesson3.orthogonalize(matrices), matrices, strict=True):
            expected = newton_schulz(matrix)
            assert (ours - expected).abs().max() <= 2e-3 * expected.abs().max()
            u, singular, v = torch.linalg.svd(matrix.double(), full_matrices=False)
            counted = singular >= 0.0015 * matrix.norm().clamp(min=1e-5)
            moved = (u.T @ ours.double() @ v.T).diagonal()[counted]
            assert ((moved > 0.68) & (moved < 1.21)).all()


def test_muon_is_that_of_pytorch(lesson3):
    """PyTorch iterates in bfloat16, so we compare how the weights have changed, to within 2 %."""
    shapes = [(12, 4, 3, 3), (6, 12, 3, 3), (36, 12, 1, 1), (40, 3, 1, 1), (9, 1, 1, 1), (1, 9, 1, 1)]
    layouts = torch.channels_last, torch.contiguous_format
    ours = [nn.Parameter(torch.randn(size).to(memory_format=kind)) for size in shapes for kind in layouts]
    before = [weight.detach().flatten(1).clone() for weight in ours]
    theirs = [nn.Parameter(weight.clone()) for weight in before]
    optimizers = lesson3.Muon(ours, 0.1, weight_decay=0.3), torch.optim.Muon(theirs, 0.1, weight_decay=0.3)
    for _ in range(6):
        for weight, twin in zip(ours, theirs, strict=True):
            weight.grad = torch.randn_like(weight)
            twin.grad = weight.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for weight, twin, start in zip(ours, theirs, before, strict=True):
        assert (weight.flatten(1) - twin).norm() < 0.02 * (twin - start).norm()


def test_each_parameter_has_one_optimizer(lesson3):
    denoiser, _, optimizers = make_parts(lesson3)
    owned = [weight for optimizer in optimizers for weight in optimizer.param_groups[0]["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) == set(denoiser.parameters())


def test_learning_rate_rises_then_falls_to_zero(lesson3):
    assert lesson3.schedule(8, 7) == lesson3.schedule(100, 7) == 0
    for steps in (1, 2, 7, 1000):
        rates = [lesson3.schedule(step, steps) for step in range(steps)]
        top = int(np.argmax(rates))
        assert 0 < min(rates) <= max(rates) <= 1
        assert top <= 0.05 * steps + 1
        assert all(a > b for a, b in pairwise(rates[top:]))
    assert max(rates) == pytest.approx(1, rel=0.01)
    assert rates[-1] < 0.01


def test_the_average_follows_and_is_smoother(lesson3):
    fast, slow, distances = nn.Linear(1, 1), nn.Linear(1, 1), []
    for step in range(400):
        nn.init.constant_(fast.weight, 3 + (-1) ** step)
        lesson3.update_ema(slow, fast, step)
        distances.append(abs(slow.weight.item() - 3))
    assert distances[0] == pytest.approx(1)  # the first weights are taken as they are
    assert distances[-1] < 0.1


# A run
SETTINGS = ("TimeUNet", "small", 12, 8, 0, "noise", 8, ("a", "b"), (8, 8), 0.5)


def test_the_average_is_what_a_checkpoint_samples_with(lesson3, tmp_path, monkeypatch):
    path, device, settings = tmp_path / "c.pt", torch.device("cpu"), lesson3.RunSettings(*SETTINGS)
    tiny = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=4)
    monkeypatch.setitem(lesson3.PRESETS, "small", tiny)

    def load():
        return lesson3.load_denoiser(path, lesson3.make_network, device)

    with pytest.raises(tools.UserError, match="no checkpoint to sample from"):
        load()
    ema = lesson3.make_denoiser(lesson3.make_network(tiny, 2), settings, device)
    content = {"settings": settings._asdict(), "step": 11, "ema": ema.state_dict()}
    tools.save_checkpoint(path, content)
    denoiser, found = load()
    assert found == settings._replace(steps=11) and found.images_seen == 88  # it was interrupted before the last step
    torch.testing.assert_close(denoiser.state_dict(), ema.state_dict(), rtol=0, atol=0)
    assert not denoiser.training and not any(parameter.requires_grad for parameter in denoiser.parameters())
    for change, complaint in (
        ({"network": "UntimedUNet"}, "network UntimedUNet, not TimeUNet"),
        ({"preset": "huge"}, "unknown preset 'huge'; this version knows small, lecture"),
    ):
        tools.save_checkpoint(path, content | {"settings": settings._replace(**change)._asdict()})
        with pytest.raises(tools.UserError, match=complaint):
            load()
    tools.save_checkpoint(path, content | {"ema": lesson3.Denoiser(nn.Linear(1, 1), 0.5).state_dict()})
    with pytest.raises(tools.UserError, match="from another version"):
        load()


# Pictures
def test_samples_are_the_last_state_and_the_strip_has_all(lesson3):
    settings, sigmas = lesson3.RunSettings(*SETTINGS), lesson3.noise_levels(3)
    noise_ids = [(0, index % 2, index) for index in range(5)]

    def denoise(x, sigma, label):
        return label.view(-1, 1, 1, 1) / 4 + torch.zeros_like(x)

    images, strip = lesson3.sample_images(denoise, noise_ids, settings, 3, torch.device("cpu"))
    assert images.shape == (5, 1, 8, 8)
    assert (images == torch.tensor([0, 0.25, 0, 0.25, 0]).view(-1, 1, 1, 1)).all()
    assert [sigma for sigma, *_ in strip] == sigmas
    assert all(part.shape == (4, 1, 8, 8) for _, *state in strip for part in state)


@pytest.mark.parametrize("size", [(28, 28), (27, 31), (1, 1), (64, 30)])
def test_crop_undoes_pad(lesson3, size):
    for preset in lesson3.PRESETS.values():
        images = torch.randint(0, 256, (2, 1, *size), dtype=torch.uint8)
        padded = lesson3.pad(images, preset)
        step = preset.patch * 2 ** (len(preset.widths) - 1)
        assert padded.shape == (2, 1, *(math.ceil(side / step) * step for side in size))
        torch.testing.assert_close(lesson3.crop(padded, size), images)
        assert padded.sum() == images.sum()


# The lesson's claims
def test_the_order_of_layers_matters(lesson3):
    x, y = noisy(2, 8, 16, 14, 14)
    first, last = (lesson3.signal_through(order, x) for order in (lesson3.activate_first, lesson3.activate_last))
    assert len(first) == len(last) == 21
    torch.testing.assert_close(first[0], x)
    assert lesson3.correlation(first[-1], x) > 0.15
    assert abs(lesson3.correlation(last[-1], x)) < 0.08
    expected = np.corrcoef(x[0, 0].flatten(), y[0, 0].flatten())[0, 1]
    assert lesson3.correlation(x[:1, :1], 3 * y[:1, :1] + 1) == pytest.approx(expected, abs=1e-6)


def test_skips_help(lesson3):
    images = torch.full((16, 1, 12, 12), -1.0)
    images[:, :, ::3] = torch.linspace(-1, 1, 16).view(16, 1, 1, 1)
    losses = [np.mean(lesson3.train_skips(cut, images, steps=40)[1][-10:]) for cut in (False, True)]
    assert losses[0] < 0.8 * losses[1]


def test_a_small_denoiser_knows_the_spread_of_its_images(lesson3):
    """So the loss of a new one is 1 (if the images' mean is 0), whatever their scale."""
    for scale in (0.1, 0.3):
        images = scale * noisy(80, 1, 28, 28)
        _, losses = lesson3.train_small(lesson3.TimeUNet, images, lesson3.use_adamw, 0.004, steps=1)
        assert losses == pytest.approx([1], abs=0.05)
