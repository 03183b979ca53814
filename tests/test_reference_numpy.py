"""The U-Nets of lessons 3 and 4, their denoiser and their samplers against reference_numpy; their gradients."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reference_numpy as reference

ROOT = Path(__file__).parent.parent
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-4)]
NETWORKS = [  # the arguments of a CondUNet and the shape of its input
    ((1, (24,), 1, 4, [0], 3, 1), (1, 1, 1, 4)),
    ((1, (2,), 3, 2, [0], 2, 2), (3, 1, 3, 2)),
    ((2, (24, 24), 3, 3, [], 4, 1), (2, 2, 8, 6)),
    ((1, (6, 4, 2), 2, 1, [1], 2, 1), (1, 1, 8, 8)),
    ((3, (18, 6, 12), 3, 3, [1, 2], 2, 3), (3, 3, 4, 16)),
    ((3, (4, 12, 12), 2, 4, [0, 1, 2], 2, 3), (2, 3, 16, 12)),
]


def numbers(*tensors):
    """Arrays for the NumPy side: float64, whatever the type on the PyTorch side."""
    return tuple(tensor.detach().double().numpy() for tensor in tensors)


def arrays(module):
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_no_torch_is_loaded():
    code = """
import sys
import reference_numpy
loaded = {name.partition(".")[0] for name in sys.modules}
wrong = {name for name in loaded if name[0].isdigit() or name in ("torch", "einops", "diffusers", "data")}
assert not wrong, wrong
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pixels_only_move():
    for patch in (1, 2, 3):
        x = torch.randn(3, 2, 2 * patch, 5 * patch, dtype=torch.float64)
        patches = F.pixel_unshuffle(x, patch)
        np.testing.assert_array_equal(reference.pixel_unshuffle(x.numpy(), patch), patches)
        np.testing.assert_array_equal(reference.pixel_shuffle(patches.numpy(), patch), x)
    np.testing.assert_array_equal(reference.upsample(x.numpy()), F.interpolate(x, scale_factor=2, mode="nearest"))


# Networks
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("arguments, shape", NETWORKS, ids=str)
def test_networks(lesson3, lesson4, redraw, compare, arguments, shape, dtype, tolerance):
    *sizes, groups, _, head_dim, n_classes = arguments
    x = torch.randn(shape, dtype=dtype)
    time = 1.1 * lesson3.TIME_SCALE * (2 * torch.rand(len(x), dtype=dtype) - 1)
    for network_class in (lesson3.UntimedUNet, lesson3.TimeUNet):
        network = redraw(network_class(*sizes, groups).to(dtype))
        expected = reference.cond_unet(*numbers(x, time), None, arrays(network), groups)
        compare(network_class.__name__, network(x, time), expected, tolerance)

    network = redraw(lesson4.CondUNet(*arguments).to(dtype))
    label = torch.randint(n_classes, (len(x),))
    label[0] = n_classes  # the one that says "no label"
    settings = {"parameters": arrays(network), "groups": groups, "head_dim": head_dim}
    expected = reference.cond_unet(*numbers(x, time), label.numpy(), **settings)
    unlabelled = reference.cond_unet(*numbers(x, time), None, **settings)
    compare("CondUNet", network(x, time, label), expected, tolerance)
    compare("CondUNet without label", network(x, time), unlabelled, tolerance)


# From noise to images
def both_sides(lesson3, lesson4, redraw, dtype, patch):
    """One denoiser in PyTorch, and the same in NumPy, `denoise(x, sigma, label)`."""
    network = redraw(lesson4.CondUNet(patch**2, (6, 12), 1, 3, [1], 6, 4).to(dtype))
    forward = partial(reference.cond_unet, parameters=arrays(network), groups=3, head_dim=6)
    settings = {"sigma_data": 0.6, "patch": patch, "time_scale": lesson3.TIME_SCALE}
    return lesson3.Denoiser(network, 0.6, patch), partial(reference.denoise, forward, **settings)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("patch", [1, 2])
def test_denoiser_and_loss(lesson3, lesson4, redraw, compare, patch, dtype, tolerance):
    denoiser, denoise = both_sides(lesson3, lesson4, redraw, dtype, patch)
    x0, noise = torch.randn(2, 5, 1, 8, 12, dtype=dtype)
    sigma, label = torch.tensor([0.02, 0.1, 0.7, 5, 80], dtype=dtype), torch.tensor([4, 0, 1, 2, 3])
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    expected = denoise(*numbers(x, sigma), label.numpy())
    compare("Denoiser", denoiser(x, sigma, label), expected, tolerance)

    expected = reference.denoising_loss(expected, *numbers(x0, sigma), denoiser.sigma_data)
    compare("loss", lesson3.denoising_loss(denoiser, x0, sigma, noise, label), expected, tolerance)


def test_where_sampling_starts_and_stops(lesson3, compare):
    for steps in (1, 2, lesson3.STEPS):
        expected = reference.noise_levels(steps, lesson3.SIGMA_MIN, lesson3.SIGMA_MAX)
        compare("noise levels", lesson3.noise_levels(steps), expected, 1e-10)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_ideal_denoiser(lesson3, compare, dtype, tolerance):
    images, noise = torch.randn(40, 2, 3, 4, dtype=dtype), torch.randn(4, 2, 3, 4, dtype=dtype)
    for sigma in (0.1, 1, 2, 80):
        x = images[:4] + sigma * noise
        expected = reference.ideal_denoiser(*numbers(x), sigma, *numbers(images))
        compare("ideal denoiser", lesson3.ideal_denoiser(images)(x, sigma), expected, tolerance)


@pytest.mark.parametrize("guidance, patch", [(0.0, 1), (1.5, 2)])
def test_eight_guided_steps_end_at_the_same_image(lesson3, lesson4, redraw, compare, guidance, patch):
    denoiser, denoise = both_sides(lesson3, lesson4, redraw, torch.float64, patch)
    noise, label = normal(3, 1, 8, 12), torch.tensor([2, 0, 3])

    def denoise_guided(x, sigma):
        sigmas = np.full(3, sigma)
        with_label, without = denoise(x, sigmas, label.numpy()), denoise(x, sigmas, np.full(3, 4))
        return reference.guide(with_label, without, guidance if sigma <= 3 else 0)

    sigmas = reference.noise_levels(8, lesson3.SIGMA_MIN, lesson3.SIGMA_MAX)
    for name in ("sample_ddim", "sample_dpm", "sample_heun"):  # all states: one more than steps
        sample, reference_sample = getattr(lesson3, name), getattr(reference, name)
        states = sample(partial(lesson4.guide(denoiser, guidance), label=label), noise, lesson3.noise_levels(8))
        expected = np.stack(reference_sample(denoise_guided, noise.numpy(), sigmas))
        compare(f"eight guided steps, {name}", torch.stack([x for _, x, _ in states]), expected, 1e-8)


def test_flow_matching_is_ddim_in_another_coordinate(lesson3, compare):
    images, noise, sigmas = normal(40, 1, 4, 6), normal(3, 1, 4, 6), lesson3.noise_levels(9)
    times = [sigma / (1 + sigma) for sigma in sigmas]
    assert times[0] == pytest.approx(80 / 81)
    states = list(lesson3.sample_flow(lesson3.ideal_denoiser(images), noise, times))
    expected = reference.sample_flow(partial(reference.ideal_denoiser, images=images.numpy()), noise.numpy(), times)
    compare("flow", torch.stack([z for _, z in states]), np.stack(expected), 1e-10)
    ddim = torch.stack([x for _, x, _ in lesson3.sample_ddim(lesson3.ideal_denoiser(images), noise, sigmas)])
    compare("DDIM", torch.stack([z / (1 - t) for t, z in states]), ddim, 1e-10)


def test_gradients(lesson4, redraw):
    """For the inputs and every parameter, against finite differences of the outputs."""
    network = redraw(lesson4.CondUNet(1, (4, 8), 1, 2, [1], 4, 3).double())
    names, parameters = zip(*network.named_parameters(), strict=True)
    x, time, label = normal(2, 1, 4, 6).requires_grad_(), (5 * normal(2)).requires_grad_(), torch.tensor([1, 3])

    def forward(*tensors):
        return torch.func.functional_call(network, dict(zip(names, tensors[3:], strict=True)), tensors[:3])

    assert torch.autograd.gradcheck(forward, (x, time, label, *parameters), fast_mode=True)
