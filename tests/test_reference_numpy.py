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
SAMPLERS = {"ddim": reference.sample_ddim, "dpm++": reference.sample_dpm, "heun": reference.sample_heun}
NETWORKS = [  # the arguments of a CondUNet and the shape of its input
    ((1, (24,), 1, 4, [0], 3, 1), (1, 1, 1, 4)),
    ((1, (2,), 3, 2, [0], 2, 2), (3, 1, 3, 2)),
    ((2, (24, 24), 3, 3, [], 4, 1), (2, 2, 8, 6)),
    ((1, (6, 4, 2), 2, 1, [1], 2, 1), (1, 1, 8, 8)),
    ((3, (18, 6, 12), 3, 3, [1, 2], 2, 3), (3, 3, 4, 16)),
    ((3, (4, 12, 12), 2, 4, [0, 1, 2], 2, 3), (2, 3, 16, 12)),
]


def numbers(*tensors):
    """For the NumPy side: in float64, whatever the type of the PyTorch side."""
    return tuple(tensor.detach().double().numpy() for tensor in tensors)


def arrays(module):
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_apart(result, expected, tolerance):
    """What the test would have noticed: differences far beyond what it allows."""
    assert np.abs(numbers(result)[0] - expected).max() > 10 * tolerance


def test_no_torch_is_loaded():
    code = """
import sys
import reference_numpy
loaded = {name.partition(".")[0] for name in sys.modules}
wrong = {name for name in loaded if name[0].isdigit() or name in ("torch", "einops", "diffusers", "data")}
assert not wrong, wrong
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Layers
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_layers(compare, dtype, tolerance):
    rng = np.random.default_rng(0)
    for _ in range(40):
        channels, out, rows, columns, stride = rng.integers(1, 5, 5).tolist()
        padding, n, *size = rng.integers((0, 1, *[max(rows, columns)] * 2), (3, 4, 10, 10)).tolist()
        sizes = (n, channels, *size), (out, channels, rows, columns), (out,)
        x, weight, bias = (torch.randn(size, dtype=dtype) for size in sizes)
        expected = reference.convolution(*numbers(x, weight, bias), stride, padding)
        compare("convolution", F.conv2d(x, weight, bias, stride, padding), expected, tolerance)

    for groups, shape in ((1, (1, 1, 2, 3)), (1, (3, 6, 4, 1)), (3, (2, 6, 3, 5)), (4, (3, 4, 2, 2))):
        weight, bias = torch.randn(2, shape[1], dtype=dtype)
        x = 3 * torch.randn(shape, dtype=dtype) + 2
        expected = reference.group_norm(numbers(x)[0], groups, *numbers(weight, bias))
        compare("group norm", F.group_norm(x, groups, weight, bias), expected, tolerance)

    x, weight, bias = (torch.randn(size, dtype=dtype) for size in ((5, 7), (3, 7), (3,)))
    compare("linear", F.linear(x, weight, bias), reference.linear(*numbers(x, weight, bias)), tolerance)
    x = torch.cat([x.flatten(), torch.tensor([0.0, 30.0, -30.0, -500.0], dtype=dtype)])
    compare("SiLU", F.silu(x), reference.silu(*numbers(x)), tolerance)


def test_pixels_only_move():
    for patch in (1, 2, 3):
        x = torch.randn(3, 2, 2 * patch, 5 * patch, dtype=torch.float64)
        patches = F.pixel_unshuffle(x, patch)
        np.testing.assert_array_equal(reference.pixel_unshuffle(x.numpy(), patch), patches)
        np.testing.assert_array_equal(reference.pixel_shuffle(patches.numpy(), patch), x)
    np.testing.assert_array_equal(reference.upsample(x.numpy()), F.interpolate(x, scale_factor=2, mode="nearest"))


# Networks
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("in_channels, out_channels, groups", [(4, 4, 2), (6, 12, 3), (8, 2, 1)])
def test_residual_blocks(lesson3, lesson4, redraw, compare, in_channels, out_channels, groups, dtype, tolerance):
    x, embedding = torch.randn(3, in_channels, 5, 4, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    block = redraw(lesson3.ResBlock(in_channels, out_channels, groups).to(dtype))
    expected = reference.residual_block(numbers(x)[0], None, arrays(block), groups)
    compare("residual block", block(x), expected, tolerance)

    block = redraw(lesson4.AttentionResBlock(in_channels, out_channels, groups, 7).to(dtype))
    expected = reference.residual_block(*numbers(x, embedding), arrays(block), groups)
    compare("residual block with scale and shift", block(x, embedding), expected, tolerance)
    for change in torch.eye(7, dtype=dtype):
        assert_apart(block(x, embedding + change), expected, tolerance)

    block.add_attention(head_dim=out_channels // 2)
    parameters, inputs = arrays(redraw(block.to(dtype))), numbers(x, embedding)
    expected = reference.unet.block(*inputs, parameters, groups, head_dim=out_channels // 2)
    compare("residual block with attention", block(x, embedding), expected, tolerance)
    assert_apart(block(x, embedding), reference.residual_block(*inputs, parameters, groups), tolerance)


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
    assert_apart(network(x, time + 1), expected, tolerance)

    network = redraw(lesson4.CondUNet(*arguments).to(dtype))
    label = torch.randint(n_classes, (len(x),))
    label[0] = n_classes  # the one that says "no label"
    settings = {"parameters": arrays(network), "groups": groups, "head_dim": head_dim}
    expected, unlabelled = (reference.cond_unet(*numbers(x, time), told, **settings) for told in (label.numpy(), None))
    compare("CondUNet", network(x, time, label), expected, tolerance)
    compare("CondUNet without label", network(x, time), unlabelled, tolerance)
    for told in ((time + 1, label), (time, (label + 1) % (n_classes + 1))):
        for result, image in zip(network(x, *told), expected, strict=True):
            assert_apart(result, image, tolerance)


@pytest.mark.parametrize("name", ["small", "lecture"])
def test_presets(lesson3, lesson4, redraw, compare, name):
    preset = lesson3.PRESETS[name]
    network, side = redraw(lesson4.MODEL.build(preset, 10).double()), 2 ** len(preset.widths)
    x, time = normal(1, preset.patch**2, side, side), lesson3.TIME_SCALE * normal(1)
    expected = reference.cond_unet(*numbers(x, time), None, arrays(network), preset.groups, preset.head_dim)
    compare(f"preset {name}", network(x, time), expected, 1e-10)


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
    assert_apart(denoiser(x, 1.1 * sigma, label), expected, tolerance)
    assert_apart(denoiser(x, sigma, label.flip(0)), expected, tolerance)

    expected = reference.denoising_loss(expected, *numbers(x0, sigma), denoiser.sigma_data)
    compare("loss", lesson3.denoising_loss(denoiser, x0, sigma, noise, label), expected, tolerance)


def test_where_sampling_starts_and_stops(lesson3, compare):
    for steps in (1, 2, lesson3.STEPS):
        expected = reference.noise_levels(steps, lesson3.SIGMA_MIN, lesson3.SIGMA_MAX)
        compare("noise levels", lesson3.noise_levels(steps), expected, 1e-10)
    for arguments in ((0, 0, 0, (2, 3, 4)), (3, 9, 12345, (2, 3, 4))):
        np.testing.assert_array_equal(lesson3.starting_noise(*arguments), reference.starting_noise(*arguments))


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_ideal_denoiser(lesson3, compare, dtype, tolerance):
    images, sigmas = torch.randn(40, 2, 3, 4, dtype=dtype), torch.tensor([0.1, 1, 2, 80], dtype=dtype)
    x = lesson3.add_noise(images[:4], sigmas, torch.randn(4, 2, 3, 4, dtype=dtype))
    result = lesson3.ideal_denoiser(images)(x, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        expected = reference.ideal_denoiser(numbers(x)[0][i : i + 1], sigma, numbers(images)[0])
        compare("ideal denoiser", result[i : i + 1], expected, tolerance)


@pytest.mark.parametrize("guidance, patch", [(0.0, 1), (1.5, 2)])
def test_eight_guided_steps_end_at_the_same_image(lesson3, lesson4, redraw, compare, guidance, patch):
    denoiser, denoise = both_sides(lesson3, lesson4, redraw, torch.float64, patch)
    noise, label = normal(3, 1, 8, 12), torch.tensor([2, 0, 3])

    def follow(label, guidance, method="ddim"):
        states = lesson3.sample(lesson4.guide(denoiser, label, guidance), noise, lesson3.noise_levels(8), method)
        return torch.stack([x for _, x, _ in states])

    def denoise_guided(x, sigma):
        sigmas = np.full(3, sigma)
        with_label, without = denoise(x, sigmas, label.numpy()), denoise(x, sigmas, np.full(3, 4))
        return reference.guide(with_label, without, guidance if sigma <= 3 else 0)

    sigmas = reference.noise_levels(8, lesson3.SIGMA_MIN, lesson3.SIGMA_MAX)
    expected = {method: np.stack(sample(denoise_guided, noise.numpy(), sigmas)) for method, sample in SAMPLERS.items()}
    results = {method: follow(label, guidance, method) for method in SAMPLERS}
    for method in SAMPLERS:  # all states: one more than steps
        compare(f"eight guided steps, {method}", results[method], expected[method], 1e-8)
    others = follow(torch.tensor([2, 1, 3]), guidance), follow(label, guidance + 0.01)
    for other in (*others, results["dpm++"], results["heun"]):
        assert_apart(other[-1], expected["ddim"][-1], 1e-8)
    assert_apart(results["heun"][-1], expected["dpm++"][-1], 1e-8)


# Gradients
def check_gradients(module, *inputs, fast=False):
    """Of the inputs and of every parameter, against differences of the outputs."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    floats = [x.requires_grad_(x.is_floating_point()) for x in inputs]

    def forward(*tensors):
        inputs, parameters = tensors[: len(floats)], tensors[len(floats) :]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), inputs)

    assert torch.autograd.gradcheck(forward, (*floats, *parameters), fast_mode=fast)


def test_gradients(lesson3, lesson4, redraw):
    for out_channels in (2, 4):
        x, embedding = normal(2, 2, 2, 3), normal(2, 3)
        check_gradients(redraw(lesson3.ResBlock(2, out_channels, 2).double()), x)
        block = lesson4.AttentionResBlock(2, out_channels, 2, 3)
        block.add_attention(head_dim=2)
        check_gradients(redraw(block.double()), x, embedding)
    network = redraw(lesson4.CondUNet(1, (4, 8), 1, 2, [1], 4, 3).double())
    check_gradients(network, normal(2, 1, 4, 6), 5 * normal(2), torch.tensor([1, 3]), fast=True)


@pytest.mark.parametrize("n, m, d, tolerance", [(50, 60, 4, 1e-10), (300, 200, 16, 1e-10), (6, 9, 12, 1e-6)])
def test_frechet_distance(n, m, d, tolerance):
    """Against the eigenvalues of A B, not symmetric; of fewer images than features, with the root of rounding, 1e-8."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((n, d)), rng.standard_normal((m, d)) @ rng.standard_normal((d, d)) + 1
    roots = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(min=0))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * roots.sum()
    assert reference.frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)
    assert reference.frechet_distance(b, a) == pytest.approx(expected, rel=tolerance)
    assert reference.frechet_distance(a, a) == pytest.approx(0, abs=tolerance)
