"""Lesson 2 against reference_numpy and PyTorch's own classes; its claims, and its pictures."""

import importlib
import itertools
import math
import re
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from test_01_time_embedding import run_main
from torch import nn

import data
import lesson_tools as tools
import reference_numpy as reference

lesson = importlib.import_module("02_attention")
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


def shapes(n):
    """Random channels, heads, groups, and image shape `(n, c, h, w)`; sometimes a single pixel, channel or head."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        heads, groups = rng.integers(1, 5, 2).tolist()
        channels = math.lcm(heads, groups) * int(rng.integers(1, 5))
        yield channels, heads, groups, (int(rng.integers(1, 4)), channels, *rng.integers(1, 9, 2).tolist())


def arrays(module):
    """A module's parameters for reference_numpy, in float64."""
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


def assert_near(result, expected, tolerance):
    """The tolerance is relative to the largest expected value."""
    result, expected = (torch.as_tensor(tensor).detach().double() for tensor in (result, expected))
    assert result.shape == expected.shape
    error = (result - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= tolerance, f"relative difference {error:.1e}"


def gradients(output, *inputs):
    """Gradients of the sum of squares, as one vector: by itself, that of the keys' bias is zero up to rounding."""
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(output.square().sum(), inputs)])


@pytest.fixture
def attention_layer(redraw):
    def make(channels, heads, groups=1, dtype=torch.float64, by_hand=False):
        attention_fn = lesson.attention if by_hand else lesson.fused_attention
        return redraw(lesson.AttentionBlock(channels, heads, groups, attention_fn).to(dtype))

    return make


# 1. What a pixel depends on
@pytest.mark.parametrize("reach", [1, 2, 5])
def test_convolutions_see_a_neighbourhood_and_attention_sees_everything(redraw, attention_layer, reach):
    x = torch.randn(1, 4, 15, 13, dtype=torch.float64)
    convolutions = redraw(nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(reach))).double())
    rows, columns = (torch.arange(15) - 7).abs() <= reach, (torch.arange(13) - 6).abs() <= reach
    assert torch.equal(lesson.input_gradient(convolutions, x, 7, 6) > 0, rows[:, None] & columns)
    for layer in (lesson.pixel_attention, attention_layer(4, 2)):
        assert lesson.input_gradient(layer, x, 0, 0).all()


# 2. The weighted average
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_weights_and_averages_equal_numpy(dtype, tolerance):
    for scale in (0, 1, 5):
        q, k, v = torch.tensor([scale, scale, 1])[:, None, None, None] * torch.randn(3, 1, 40, 6, dtype=dtype)
        weights = lesson.attention_weights(q, k)
        expected = reference.attention(*(t[0].double().numpy() for t in (q, k, v)))
        for averages in (weights @ v, lesson.attention(q, k, v), lesson.fused_attention(q, k, v)):
            assert_near(averages[0], expected, tolerance)
    attended = lesson.pixel_attention(v.mT.unflatten(2, (8, 5)))
    assert_near(attended.flatten(2).mT, lesson.attention(v, v, v), tolerance)


def test_a_pocket_calculator_gets_the_next_number_from_the_digits_shown(capsys):
    """The picture shows whole numbers, then weights with three decimals, averages and sums with two."""
    figure = lesson.show_tokens()
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    plt.close(figure)
    x, q, k, v, scores, weights, averages, sums = (np.array(texts, float).reshape(3, -1) for texts in shown)
    digits = [{len(text.partition(".")[2]) for text in texts} for texts in shown]
    assert digits == [{0}] * 5 + [{3}, {2}, {2}]
    np.testing.assert_array_equal(scores, q @ k.T / 2)
    exponentials = 2.718**scores
    np.testing.assert_array_equal(weights, (exponentials / exponentials.sum(axis=1, keepdims=True)).round(3))
    np.testing.assert_array_equal(averages, (weights @ v).round(2))
    np.testing.assert_array_equal(sums, (x + averages).round(2))
    assert np.array_equal(averages, reference.attention(q, k, v).round(2))
    printed = capsys.readouterr().out
    assert "softmax      0.468 0.468 0.063 | 0.787 0.107 0.107 | 0.107 0.107 0.787" in printed


# 4. Pixels
def test_a_token_is_the_normalised_patch_around_its_pixel():
    images = torch.randn(2, 1, 6, 7)
    tokens, padded = lesson.patch_tokens(images).unflatten(1, (6, 7)), F.pad(images, (2, 2, 2, 2), value=-1)[:, 0]
    for row, column in itertools.product(range(6), range(7)):
        patch = padded[:, row : row + 5, column : column + 5].flatten(1)
        assert_near(tokens[:, row, column], F.layer_norm(patch, (25,)), 1e-6)


def test_one_garment_of_each_class_also_of_other_data(monkeypatch):
    """The other data: images that are not 28 × 28, few classes, and one of them empty."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 14, 7), np.uint8)
    test = data.Dataset(pixels, np.array([2, 2, 0, 2, 0, 0]), ("none", "all", "some"), "symbols")
    monkeypatch.setattr(tools, "load_data", lambda split, download: test)
    images, classes, name = tools.load_one_of_each()
    assert classes == ["none", "some"] and name == "symbols" and images.shape == (2, 1, 28, 28)
    expected = torch.from_numpy(pixels[[2, 0]]).repeat_interleave(2, dim=1).repeat_interleave(4, dim=2)
    assert_near(images[:, 0], expected / 127.5 - 1, 1e-6)
    for show in (lesson.show_one_pixel, lesson.show_rearrange):
        plt.close(show())


# 5. What flattening loses
def test_permuting_pixels_permutes_the_output_of_attention(attention_layer):
    x, order = torch.randn(2, 8, 5, 7, dtype=torch.float64), torch.randperm(35)
    assert torch.equal(lesson.permute_pixels(x, order).flatten(2), x.flatten(2)[:, :, order])
    for layer in (lesson.pixel_attention, attention_layer(8, 2)):
        assert_near(layer(lesson.permute_pixels(x, order)), lesson.permute_pixels(layer(x), order), 1e-12)
    assert lesson.relative_error(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -4.0])) == 0.25


# 7. One head
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_one_head_with_three_projections_equals_numpy_with_one(redraw, dtype, tolerance):
    for channels, _, groups, shape in shapes(20):
        layer = redraw(lesson.SelfAttention(channels, groups).to(dtype))
        p = {name.replace("proj", "attention.proj"): array for name, array in arrays(layer).items()}
        for name in ("weight", "bias"):
            p[f"attention.qkv.{name}"] = np.concatenate([p[f"{part}.{name}"] for part in "qkv"])
        x = torch.randn(shape, dtype=dtype)
        expected = reference.attention_block(x.double().numpy(), p, 1, groups)
        assert_near(layer(x), expected, tolerance)


# 8 to 12. Several heads, ours and PyTorch's
def test_heads_are_folded_into_the_batch_and_back():
    for _, heads, _, (n, c, s, _) in shapes(20):
        x = torch.randn(n, s, heads * c)
        folded = lesson.heads_to_batch(x, heads)
        assert torch.equal(folded, rearrange(x, "n s (heads d) -> (n heads) s d", heads=heads))
        assert torch.equal(lesson.batch_to_heads(folded, heads), x)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_heads_equal_numpy_and_pytorch(attention_layer, by_hand, dtype, tolerance):
    for i, (channels, heads, groups, shape) in enumerate(shapes(60)):
        layer = attention_layer(channels, heads, groups, dtype, by_hand)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        expected = reference.attention_block(x.detach().double().numpy(), arrays(layer), heads, groups)
        assert_near(layer(x), expected, tolerance)
        if i < 20:
            theirs, tokens = lesson.to_torch_mha(layer.attention), layer.norm(x).flatten(2).mT
            averages, weights = theirs(tokens, tokens, tokens, average_attn_weights=False)
            assert_near(layer.attention(tokens), averages, tolerance)
            assert_near(layer.weights(x), weights, tolerance)
            expected = gradients(x + averages.mT.reshape(shape), x, *layer.norm.parameters(), *theirs.parameters())
            assert_near(gradients(layer(x), x, *layer.parameters()), expected, tolerance)


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_attention_in_bfloat16(autocast):
    q, k, v = torch.randn(3, 2, 3, 10, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", enabled=autocast):
        averages = lesson.fused_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
    assert averages.dtype == torch.bfloat16 and torch.equal(averages, expected)


# 11. What heads are for
def test_ears_are_marked_and_asked_for():
    images, answers = lesson.make_ears(20)
    assert images.shape == (20, 8, 5, 5) and answers.shape == (20, 12)
    for image, answer in zip(images, answers, strict=True):
        left, right = (mark.nonzero() for mark in image[-2:])
        assert len(left) == len(right) == 1 and not torch.equal(left, right)
        assert_near(answer, torch.cat([image[:6, *left[0]], image[:6, *right[0]]]), 1e-6)
    two_off = answers[:, :, None, None].expand(20, 12, 5, 5) + 2
    assert_near(lesson.ear_error(lambda _: two_off, images, answers), 4, 1e-6)


# 13. What it costs
def test_fused_attention_keeps_no_weights():
    kept = {}
    for side in (16, 32):
        x, layers = torch.randn(3, 16, side, side), lesson.cost_layers(channels=16, heads=4)
        by_hand, fused, convolution = kept[side] = [lesson.saved_bytes(layer, x) for layer in layers.values()]
        assert by_hand >= 4 * 4 * side**4  # all weights of one image
        assert fused < by_hand / 10
        assert convolution == 4 * 16 * side**2  # its input, but neither its parameters nor the other images
    assert kept[32][0] > 14 * kept[16][0]  # grows with the square of the number of pixels
    assert kept[32][1] < 4.1 * kept[16][1]  # grows with the number of pixels


# 14. Transformers
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_transformer_block_equals_pytorch(redraw, dtype, tolerance):
    for channels, heads, _, (n, _, s, _) in shapes(20):
        block = redraw(lesson.TransformerBlock(channels, heads).to(dtype))
        tokens = torch.randn(n, s, channels, dtype=dtype)
        options = {"dropout": 0, "activation": "gelu", "batch_first": True, "norm_first": True}
        theirs = nn.TransformerEncoderLayer(channels, heads, 4 * channels, **options).to(dtype)
        theirs.self_attn.load_state_dict(lesson.to_torch_mha(block.attention).state_dict())
        for name, part in (("norm1", "norm1"), ("norm2", "norm2"), ("linear1", "mlp.0"), ("linear2", "mlp.2")):
            theirs.get_submodule(name).load_state_dict(block.get_submodule(part).state_dict())
        assert_near(block(tokens), theirs(tokens), tolerance)
        blocks = [redraw(lesson.TransformerBlock(channels, heads).to(dtype)) for _ in range(3)]
        assert_near(nn.Sequential(*blocks)(tokens), lesson.to_torch_encoder(blocks)(tokens), tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("size, patch, channels_in", [(28, 7, 1), (6, 2, 3), (4, 4, 2), (3, 1, 1)])
def test_vision_transformer_equals_numpy(redraw, dtype, tolerance, size, patch, channels_in):
    model = lesson.VisionTransformer(size, patch, channels=8, depth=2, heads=2, n_classes=5, channels_in=channels_in)
    parameters, images = arrays(redraw(model.to(dtype))), torch.randn(2, channels_in, size, size, dtype=dtype)
    expected = [reference.vision_transformer(x, parameters, 2, 2, patch) for x in images.double().numpy()]
    assert model.encode(images).shape == (2, (size // patch) ** 2, 8)
    assert_near(model(images), np.stack(expected), tolerance)


# 15. Elsewhere
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_cross_attention_equals_numpy_and_pytorch(redraw, dtype, tolerance):
    for channels, _, _, (n, words, s, word_channels) in shapes(20):
        sizes = {"q": channels, "k": word_channels, "v": word_channels}
        layers = redraw(nn.ModuleDict({name: nn.Linear(size, channels) for name, size in sizes.items()}).to(dtype))
        x, prompt = torch.randn(n, s, channels, dtype=dtype), torch.randn(n, words, word_channels, dtype=dtype)
        pairs = zip(x.double().numpy(), prompt.double().numpy(), strict=True)
        expected = np.stack([reference.cross_attention(*pair, arrays(layers)) for pair in pairs])
        result = lesson.cross_attention(x, prompt, *layers.values())
        assert_near(result, expected, tolerance)
        theirs = nn.MultiheadAttention(channels, 1, batch_first=True, kdim=word_channels, vdim=word_channels).to(dtype)
        weights = [layer.weight for layer in layers.values()]
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        state = dict(zip(names, weights, strict=True))
        if word_channels == channels:  # then PyTorch has one matrix for all three
            state = {"in_proj_weight": torch.cat(weights)}
        state["in_proj_bias"] = torch.cat([layer.bias for layer in layers.values()])
        state |= {"out_proj.weight": torch.eye(channels), "out_proj.bias": torch.zeros(channels)}
        theirs.load_state_dict(state)
        assert_near(result, theirs(x, prompt, prompt)[0], tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_a_causal_mask_equals_numpy_and_pytorch(dtype, tolerance):
    for s in (1, 2, 7):
        q, k, v = torch.randn(3, 2, s, 5, dtype=dtype)
        averages = lesson.causal_attention(q, k, v)
        assert_near(averages, F.scaled_dot_product_attention(q, k, v, is_causal=True), tolerance)
        expected = [reference.causal_attention(*(t[i].double().numpy() for t in (q, k, v))) for i in range(2)]
        assert_near(averages, np.stack(expected), tolerance)


# 16. Convolutions
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_attention_expresses_any_convolution(redraw, dtype, tolerance):
    """Also on images of a single pixel, row or column."""
    rng, small = np.random.default_rng(0), [(1, 1), (1, 9), (7, 1), (2, 2), (3, 3)]
    for i in range(40):
        n, channels_in, channels_out, *size = rng.integers(1, (4, 20, 20, 20, 20)).tolist()
        conv = redraw(nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=i % 3 < 2).to(dtype))
        layer = lesson.attention_from_convolution(conv)
        x = torch.randn(n, channels_in, *(small[i] if i < 5 else size), dtype=dtype)
        for scale in (1e-4, 1e4, 1):  # without a bias, scale wouldn't matter; with one, it drowns small inputs
            expected = conv(scale * x)
            assert_near(layer(scale * x), expected, tolerance)
        if i < 7 and conv.bias is not None:
            numpys = reference.convolution_by_attention(x[0].double().numpy(), *arrays(conv).values())
            assert_near(expected[0], numpys, tolerance)
    redraw(conv)  # the layer has a copy of the kernel
    assert_near(layer(x), expected, tolerance)


# What is refused
KINDS = [lesson.MultiHeadSelfAttention, lesson.AttentionBlock, lesson.TransformerBlock]
GROUPED = [lesson.SelfAttention, partial(lesson.AttentionBlock, heads=2)]
OPTIONS = [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}, {"padding": "valid"}]
OPTIONS += [{"padding": 0}, {"kernel_size": 1, "padding": 0}, {"kernel_size": 5}, {"kernel_size": (3, 1)}]
OTHERS = [nn.Conv2d(2, 2, **{"kernel_size": 3, "padding": 1} | options) for options in OPTIONS]
OTHERS += [nn.ConvTranspose2d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1), nn.Linear(2, 2)]


@pytest.mark.parametrize(
    "make, message",
    [
        *((partial(kind, 8, heads), f"got {heads} heads, 8 channels") for kind in KINDS for heads in (3, 16, 0, -2)),
        *((partial(kind, 8, groups=groups), "num_channels") for kind in GROUPED for groups in (3, 16)),
        *((partial(lesson.VisionTransformer, patch=patch), f"got {patch} and 28") for patch in (3, 0, -2)),
        *((partial(lesson.attention_from_convolution, other), r"'kernel_size': \(3, 3\).*, got") for other in OTHERS),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The script
def test_costs_are_measured_on_the_cpu_if_the_gpu_is_unusable(monkeypatch, capsys):
    def fail(n, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(lesson, "SIDES", (2, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fail)
    lesson.show_cost()
    assert "2 × " in capsys.readouterr().out


def test_script_draws_and_prints_what_is_true(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "SIDES", (4, 8))
    printed, pictures = run_main(lesson, tmp_path, monkeypatch, capsys)
    expected = ["01_reach", "02_tokens", "04_one_pixel", "05_shuffled_pixels", "06_division", "09_rearrange", "11_ears"]
    assert pictures == [f"{name}.png" for name in (*expected, "13_cost")]
    sections = re.split(r"^\d+\. ", printed, flags=re.M)

    def numbers(section, pattern):
        return [float(found) for found in re.findall(pattern, sections[section])]

    assert numbers(1, r"depends on (\d+) of 784") == [9, 25, 169, 728]
    assert numbers(4, r"depends on (\d+) of 784") == [784] and 0 < numbers(4, r"(\d+)% of all patches")[0] < 100
    attention, convolution = numbers(5, r"relative difference (\S+)")
    assert attention < 1e-12 and convolution > 0.1
    assert sections[9].count("the same by hand: True") == len(lesson.EXAMPLES)
    assert max(number for section in (7, 8, 10) for number in numbers(section, r"off by (\S+)")) < 1e-5
    undivided, divided = numbers(6, r" undivided .*weight (\S+)"), numbers(6, r" divided .*weight (\S+)")
    assert undivided == sorted(undivided) and undivided[-1] > 0.8 and max(divided) < 0.06
    one_head, two_heads = numbers(11, r"error (\S+)")
    assert one_head > 0.4 and two_heads < 0.01
    shares = np.array([numbers(11, r"gives (\d+)%")[1:], numbers(11, r"(\d+)% to the right")[1:]])  # ears × heads
    assert abs(np.linalg.det(shares / 100)) > 0.9  # each ear has a head of its own
    right, wrong = numbers(12, r"off by (\S+);")
    none, some = numbers(12, r"changes image 0 by (\S+)")
    assert right < 1e-5 and none == 0 and wrong > 0.1 and some > 0.1
    with_positions, without, encoder = numbers(14, r" by (\S+)\n")
    assert with_positions > 1e-4 and without < 1e-5 and encoder < 1e-5
    assert "32 × 32 pixels: The size of tensor a (64) must match" in sections[14]
    assert "weights (64, 5) -> averages (64, 32)" in sections[15] and numbers(15, r"earlier tokens by (\S+)\n") == [0]
    assert max(numbers(16, r"relative difference (\S+)")) < 1e-5
    assert numbers(16, r"(\d+)%") == [100, 100, 100, 100, 0, 0, 100, 0, 0]  # above, and to the left
