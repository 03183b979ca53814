"""Lesson 4: attention where it is asked for, labels, guidance."""

import re

import pytest
import torch
from test_03_unet_uncond import run_cells
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import data


@pytest.fixture
def cond_unet(lesson4, redraw):
    return redraw(lesson4.CondUNet(2, (8, 16), 1, 4, attention_levels=(1,), head_dim=4, n_classes=3))


@pytest.fixture
def inputs():
    return torch.randn(4, 2, 8, 12), torch.randn(4) * 100, torch.tensor([0, 1, 2, 3])


def attention_layers(lesson4, network):
    kind = lesson4.MultiHeadSelfAttention
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


def test_attention_stands_on_its_levels_and_in_the_middle(lesson4):
    network = lesson4.CondUNet(1, (8, 16, 32), 2, 4, attention_levels=(0, 2), head_dim=8, n_classes=10)
    layers = attention_layers(lesson4, network)
    # down: levels of two blocks with a convolution after the first two levels; up: three blocks, then upsampling
    assert list(layers) == [
        *(f"down.{i}.attention" for i in (0, 1, 6, 7)),
        "middle.0.attention",
        *(f"up.{i}.attention" for i in (0, 1, 2, 8, 9, 10)),
    ]
    assert {layer.qkv.in_features // layer.heads for layer in layers.values()} == {8}


def test_shape_and_silence_at_the_start(lesson4, inputs):
    network = lesson4.CondUNet(2, (8, 16), 1, 4, (1,), 4, 3)
    assert not network(*inputs).any()
    for layer in attention_layers(lesson4, network).values():
        x = torch.randn(1, layer.qkv.in_features, 4, 4)
        torch.testing.assert_close(layer(x), x)


def test_skips_are_taken_after_attention(lesson4, cond_unet, inputs):
    block = cond_unet.down[2]
    assert isinstance(block, lesson4.SavedAttentionResBlock)
    seen = {}
    block.attention.register_forward_hook(lambda module, arguments, output: seen.update(attention=output))
    take = block.take
    block.take = lambda: seen.setdefault("skip", take())
    cond_unet(*inputs)
    assert seen["skip"] is seen["attention"]
    assert block.saved is None


@pytest.mark.parametrize("changed", ["time", "label"])
def test_time_and_label_change_their_own_image_only(cond_unet, inputs, changed):
    x, time, label = inputs
    before = cond_unet(x, time, label)
    if changed == "time":
        time = time + torch.tensor([0.0, 3.0, 0.0, 0.0])
    else:
        label = label.clone()
        label[1] = 0
    after = cond_unet(x, time, label)
    assert (before[1] - after[1]).abs().max() > 1e-3
    others = [0, 2, 3]
    torch.testing.assert_close(before[others], after[others])


def test_every_parameter_changes_the_output(cond_unet, inputs):
    before = cond_unet(*inputs).detach()
    for name, parameter in cond_unet.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += 0.5 * torch.randn_like(parameter)
            changed = (cond_unet(*inputs) - before).abs().max()
            parameter.copy_(kept)
        if name.endswith("attention.qkv.bias"):
            continue  # its key part cancels in the softmax; the other parts are covered by the weights' own tests
        assert changed > 1e-4, name
    torch.testing.assert_close(cond_unet(*inputs).detach(), before)


def test_every_parameter_gets_a_gradient(cond_unet, inputs):
    cond_unet(*inputs).square().mean().backward()
    for name, parameter in cond_unet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_compiled_network_is_the_same_network(lesson3, lesson4, cond_unet, monkeypatch, capsys):
    """Traced once and as a whole (fullgraph), but not translated by a C++ compiler, which takes a minute."""
    names, compile_network = list(cond_unet.state_dict()), nn.Module.compile
    graphs = CompileCounterWithBackend("aot_eager")
    how = {"backend": graphs, "fullgraph": True}
    monkeypatch.setattr(nn.Module, "compile", lambda network, **more: compile_network(network, **how, **more))
    denoiser = lesson3.Denoiser(cond_unet, 0.5)
    batch = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 9.0]), torch.randn(3, 2, 8, 8), torch.tensor([0, 2, 3])

    def loss_and_gradients():
        denoiser.zero_grad()
        loss = lesson3.denoising_loss(denoiser, *batch).mean()
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in denoiser.parameters())]

    before = loss_and_gradients()
    lesson3.compile_network(denoiser, batch)
    assert "failed" not in capsys.readouterr().out
    for _ in range(2):
        for ours, expected in zip(loss_and_gradients(), before, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert graphs.frame_count == 1
    assert list(cond_unet.state_dict()) == names
    assert all(layer.saved is None for layer in cond_unet.modules() if isinstance(layer, lesson3.Saved))


def test_no_label_is_the_last_row(cond_unet, inputs):
    x, time, _ = inputs
    torch.testing.assert_close(cond_unet(x, time), cond_unet(x, time, torch.full((4,), 3)))
    with pytest.raises(IndexError):
        cond_unet(x, time, torch.full((4,), 4))


def test_labels_are_dropped_one_time_in_ten(lesson4, cond_unet):
    label = torch.arange(30_000) % 3
    dropped = cond_unet.training_label(label, torch.Generator().manual_seed(1))
    no_label = dropped == 3
    assert no_label.float().mean() == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(dropped[~no_label], label[~no_label])
    again = cond_unet.training_label(label, torch.Generator().manual_seed(1))
    torch.testing.assert_close(dropped, again)


def test_the_lower_lessons_train_without_labels(lesson3):
    assert lesson3.TimeUNet(1, (8,), 1, 4).training_label(torch.arange(3), None) is None


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0, -1.0])
def test_guidance_is_a_line_through_two_predictions(lesson3, lesson4, cond_unet, guidance):
    denoiser = lesson3.Denoiser(cond_unet, 0.6)
    x, sigma, label = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 9.0]), torch.tensor([2, 0, 1])
    calls = []
    cond_unet.register_forward_hook(lambda *_: calls.append(1))
    guided = lesson4.guide(denoiser, label, guidance, below=9)(x, sigma)
    assert len(calls) == 1
    with_label, without = denoiser(x, sigma, label), denoiser(x, sigma, torch.full((3,), 3))
    assert (with_label - without).abs().max() > 1e-2
    torch.testing.assert_close(guided, (1 + guidance) * with_label - guidance * without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("guidance", "guided"), [(0.7, [True, True, False]), (-1.0, [True] * 3), (0, [False] * 3)])
def test_guidance_begins_where_the_noise_is_down(lesson3, lesson4, cond_unet, guidance, guided, dtype):
    denoiser = lesson3.Denoiser(cond_unet.to(dtype), 0.6)
    x, sigma = torch.randn(3, 2, 8, 8, dtype=dtype), torch.tensor([0.1, 3.0, 3.01], dtype=dtype)
    label = torch.tensor([2, 0, 1])
    images = []
    cond_unet.register_forward_hook(lambda _, inputs, output: images.append(len(output)))
    denoise = lesson4.guide(denoiser, label, guidance)
    found = denoise(x, sigma)
    for guided_one, x0_hat, plain, other in zip(
        guided, found, denoiser(x, sigma, label), denoiser(x, sigma, torch.full((3,), 3)), strict=True
    ):
        expected = plain + guidance * (plain - other) if guided_one else plain
        limit = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(x0_hat, expected, rtol=limit, atol=limit)
    denoise(x[2:].expand(3, -1, -1, -1), sigma[2:].expand(3))  # all above: without the half that isn't needed
    assert images == [6 if guidance else 3, 3, 3, 6 if guidance < 0 else 3]


@pytest.mark.parametrize(
    ("text", "expected"), [("Ankle boot", 9), ("ankle BOOT", 9), ("9", 9), ("0", 0), ("T-shirt/top", 0)]
)
def test_a_class_is_found_by_name_or_number(lesson4, text, expected):
    from data.fashion_mnist import CLASSES

    assert lesson4.find_classes(text, CLASSES) == [expected]


@pytest.mark.parametrize("text", ["10", "-1", "boot", "", "1.5", "²"])
def test_another_class_is_refused_with_what_is_accepted(lesson4, lesson3, text):
    from data.fashion_mnist import CLASSES

    with pytest.raises(lesson3.UserError, match=r"T-shirt/top, .*, Ankle boot, or a number from 0 to 9"):
        lesson4.find_classes(text, CLASSES)


def test_where_classes_are_numbers_a_number_is_a_name(lesson4):
    assert lesson4.find_classes("3", ("0", "1", "2", "3")) == [3]


def test_without_a_class_all_are_drawn(lesson4):
    assert lesson4.find_classes(None, ("a", "b", "c")) == [0, 1, 2]


def test_heads_of_another_size_are_refused(lesson4):
    with pytest.raises(ValueError, match="head_dim must divide the 12 channels"):
        lesson4.AttentionResBlock(8, 12, 4, 16, head_dim=8)


# The lesson's claims
def test_attention_weights_grow_with_the_square_of_the_pixels_and_are_not_kept(lesson3, lesson4):
    preset = lesson3.PRESETS["lecture"]._replace(widths=(16, 16), groups=4)
    (side, without, with_attention, weights, *seconds), below = list(lesson4.measure_levels(preset, 32))
    assert side == 32
    assert weights == 4 * 2 * 1024**2  # bytes of float32, two heads
    assert weights == 16 * below[3]
    assert without < with_attention < without + 0.2 * weights
    assert all(second > 0 for second in seconds)


def test_blended_labels_lead_from_class_to_class(lesson3, lesson4, cond_unet, inputs):
    x, time, _ = inputs
    denoiser = lesson3.Denoiser(cond_unet, 0.6)
    blended = lesson4.blend(denoiser, 2, 0, 3).network
    for label, expected in ((0, 2), (2, 0)):
        ours, theirs = blended(x, time, torch.full((4,), label)), cond_unet(x, time, torch.full((4,), expected))
        torch.testing.assert_close(ours, theirs)
    middle = blended.embed_label.weight[1]
    torch.testing.assert_close(middle, (cond_unet.embed_label.weight[0] + cond_unet.embed_label.weight[2]) / 2)
    assert blended.embed_label is not cond_unet.embed_label


def test_caught_weights_are_those_of_the_layer(lesson3, lesson4, cond_unet):
    denoiser = lesson3.Denoiser(cond_unet, 0.6)
    layer = cond_unet.middle[0].attention
    seen = []
    layer.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    weights = lesson4.catch_weights(layer, denoiser, torch.randn(2, 2, 8, 12), torch.tensor([1.0, 3.0]))
    assert weights.shape == (2, layer.heads, 4 * 6, 4 * 6)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, layer.heads, 24))
    expected, expected_weights = layer(seen[0][0], return_weights=True)
    torch.testing.assert_close(expected, seen[0][1])  # what the network used, fused
    torch.testing.assert_close(weights, expected_weights)


def test_every_cell_runs_in_order_and_draws(lesson3, tmp_path, monkeypatch, capsys):
    def garments(name, split, folder=None):
        return data.load("garments", split)

    preset = lesson3.Preset((8, 16), 1, 4, 2, (1,), 8, 8, 1e-3, 0.01)
    monkeypatch.setitem(lesson3.PRESETS, "small", preset)
    monkeypatch.setitem(lesson3.PRESETS, "lecture", preset)
    monkeypatch.setattr(lesson3, "load", garments)
    namespace = run_cells("04_unet_cond.py", tmp_path, {}, monkeypatch)
    assert capsys.readouterr().out.count("left out") == 4  # the sections that need what the last cell trains
    out = tmp_path / "runs" / "04_unet_cond"
    for show in namespace["lesson"].shows:
        namespace["lesson"].run(show)
    printed = capsys.readouterr().out
    assert re.findall(r"^(\d)\. ", printed, flags=re.MULTILINE) == list("12345")
    (away,) = re.findall(r"at sigma 3: (.*) away", printed)
    away = [float(number) for number in away.split(", ")]
    assert away == pytest.approx([away[3] * abs(w) for w in (-1, 0, 0.5, 1, 3)], abs=0.02)
    names = ["01_balance", "02_labels", "03_guidance", "03_line", "04_blend", "05_look"]
    assert sorted(path.stem for path in (out / "lesson").iterdir()) == names
