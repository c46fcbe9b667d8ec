"""Layers for images: against torch's own and against plain sums."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tractkit.core.rng import fold, normal
from tractkit.models import blocks, layers
from tractkit.models.blocks import (
    FPN,
    CenteredCrop,
    ConsistentSequential,
    InterpolateToInput,
    Lambda,
    MidActivation,
    MoveAxis,
    PostActivation,
    PostActivation2d,
    PreActivation,
    PreActivation3d,
    PyramidPooling,
    ResBlock1d,
    ResBlock2d,
    ResBlock3d,
    Reshape,
    Softmax,
    Split,
    SplitAdd,
    SplitCat,
    SplitReduce,
)


def draws(*shape):
    return torch.from_numpy(normal(fold("blocks", *shape), np.arange(int(np.prod(shape)))).reshape(shape))


def test_all_are_found_among_the_layers():
    names = [n for n in blocks.__all__ if not n.startswith("_")]
    assert len(names) > 30 and all(getattr(layers, n) is getattr(blocks, n) for n in names)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(4, 11), st.integers(4, 9))
def test_pyramid_pooling(levels, height, width):
    x = draws(2, 3, height, width)
    pooled = PyramidPooling(nn.functional.max_pool2d, levels)(x)
    assert pooled.shape == (2, PyramidPooling.get_out_features(3, levels, 2))
    np.testing.assert_array_equal(pooled[:, :3], x.amax((2, 3)))
    at = 3
    for level in range(1, levels):  # the first cell of a level begins in the corner, the last ends in the other
        cells = pooled[:, at:at + 3 * 4**level].view(2, 3, 2**level, 2**level)
        rows, columns = (s - (2**level - 1) * (s // 2**level) for s in (height, width))
        np.testing.assert_array_equal(cells[..., 0, 0], x[..., :rows, :columns].amax((2, 3)))
        np.testing.assert_array_equal(cells[..., -1, -1], x[..., -rows:, -columns:].amax((2, 3)))
        at += 3 * 4**level


def test_pooling_in_other_dimensions_and_what_it_refuses():
    assert PyramidPooling(nn.functional.avg_pool1d, 2)(draws(2, 3, 5)).shape == (2, 9)
    assert PyramidPooling(nn.functional.avg_pool3d, 2)(draws(2, 3, 4, 5, 6)).shape == (
        2,
        PyramidPooling.get_out_features(3, 2, 3),
    )
    for x in (draws(2, 3, 1), draws(2, 3)):
        with pytest.raises(ValueError, match="along each axis"):
            PyramidPooling(nn.functional.avg_pool1d, 2)(x)
    with pytest.raises(ValueError, match="at least 1"):
        PyramidPooling(nn.functional.avg_pool1d, 0)


def test_shapes():
    x = draws(2, 3, 6, 8)
    np.testing.assert_array_equal(Reshape("0", "1", -1)(x), x.reshape(2, 3, 48))
    np.testing.assert_array_equal(MoveAxis([1, 2], [3, 1])(x), np.moveaxis(x.numpy(), [1, 2], [3, 1]))
    np.testing.assert_allclose(Softmax(1)(x), x.softmax(1), rtol=1e-5)
    np.testing.assert_allclose(
        Softmax((1, 3))(x), x.movedim(2, 1).flatten(2).softmax(-1).view(2, 6, 3, 8).movedim(1, 2), rtol=1e-5
    )
    assert torch.isfinite(Softmax((2, 3))(x * 1e3)).all()
    np.testing.assert_array_equal(CenteredCrop([1, 0])(x), x[:, :, 1:-1])
    np.testing.assert_array_equal(CenteredCrop(2)(x), x[:, :, 2:-2, 2:-2])
    np.testing.assert_array_equal(CenteredCrop([1])(x), x[:, :, 1:-1])
    np.testing.assert_array_equal(CenteredCrop([1, 2], [3, None])(x), x[:, :, 1:3, 2:])
    with pytest.raises(ValueError, match="does not fit"):
        CenteredCrop([1, 1, 1])(x)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
def test_interpolation_to_the_input(mode):
    x = draws(2, 3, 7, 9)
    y = InterpolateToInput(nn.AvgPool2d(2), mode)(x)
    smooth = {"align_corners": False} if mode.startswith("bi") else {}
    np.testing.assert_array_equal(
        y, nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), size=(7, 9), mode=mode, **smooth)
    )
    assert InterpolateToInput(nn.AvgPool2d(2), mode, axis=0)(x).shape == (2, 3, 7, 4)
    assert torch.equal(InterpolateToInput(nn.Identity())(x), x)


def test_paths():
    x = draws(2, 3, 4)
    double, add = Lambda(torch.mul, other=2), Lambda(lambda a, b: a + b, b=1)
    np.testing.assert_array_equal(SplitAdd(nn.Identity(), double, add)(x), 4 * x + 1)
    assert torch.equal(x, draws(2, 3, 4))  # not added in place
    np.testing.assert_array_equal(SplitCat(double, add, axis=2)(x), torch.cat([2 * x, x + 1], 2))
    assert [len(Split(double, add)(x)), SplitReduce(lambda ys: max(y.sum() for y in ys), double, add)(x)] == [
        2,
        max(2 * x.sum(), (x + 1).sum()),
    ]


@pytest.mark.parametrize("kind, order", [(PreActivation, "bal"), (PostActivation, "lba"), (MidActivation, "lab")])
def test_orders(kind, order):
    block = kind(
        3, 5, layer_module=nn.Conv2d, kernel_size=3, batch_norm_module=nn.BatchNorm2d, activation_module=nn.ELU
    ).eval()
    nn.init.constant_(block.bn.running_mean, .5)
    x = draws(2, 3, 6, 6)
    y = x
    for part in order:
        y = {"b": block.bn, "a": nn.functional.elu, "l": block.layer}[part](y)
    np.testing.assert_array_equal(block(x).detach(), y.detach())
    assert block.bn.num_features == (3 if order[0] == "b" else 5)


def test_biases():
    assert PostActivation2d(3, 4, kernel_size=3).layer.bias is None
    assert PostActivation2d(3, 4, kernel_size=3, batch_norm_module=None).layer.bias is not None
    assert PreActivation3d(3, 4, kernel_size=3).layer.bias is not None
    assert PreActivation3d(3, 4, kernel_size=3, bias=False, dilation=2).layer.bias is None
    chain = ConsistentSequential(nn.Linear, [2, 3, 4], bias=False)
    assert [(m.in_features, m.out_features, m.bias) for m in chain] == [(2, 3, None), (3, 4, None)]
    with pytest.raises(ValueError, match="at least two"):
        ConsistentSequential(nn.Linear, [2])


@pytest.mark.parametrize("path_type", ["pre", "post", "mid"])
def test_residual_blocks(path_type):
    block = ResBlock2d(3, 3, kernel_size=3, path_type=path_type).eval()
    x = draws(2, 3, 8, 7)
    np.testing.assert_array_equal(block(x).detach(), (block.conv_path(x) + x[..., 2:-2, 2:-2]).detach())
    strided = ResBlock3d(3, 5, kernel_size=3, stride=2, padding=1, path_type=path_type).eval()
    volume = draws(1, 3, 6, 7, 8)
    np.testing.assert_array_equal(
        strided(volume).detach(), (strided.conv_path(volume) + strided.shortcut(volume)).detach()
    )
    assert ResBlock1d(3, 3, kernel_size=3, padding=2, dilation=2, stride=(2,))(draws(2, 3, 9)).shape == (2, 3, 5)
    with pytest.raises(ValueError, match="lower its padding"):
        ResBlock2d(3, 3, kernel_size=1, padding=1)(x)
    with pytest.raises(ValueError, match="path_type"):
        ResBlock2d(3, 3, kernel_size=1, path_type="none")


def test_feature_pyramids():
    structure = [[[2, 3], [3, 2]], [[3, 4], [4, 3]], [[4, 5, 4]]]
    def build(structure, **options):
        return FPN(
            nn.Conv2d,
            nn.MaxPool2d(2),
            lambda: nn.Upsample(scale_factor=2),
            torch.add,
            structure,
            kernel_size=1,
            **options,
        )

    net, x = build(structure, last_level=False), draws(1, 2, 8, 12)
    a = net.down_path[0](x)
    b = net.down_path[1](nn.functional.max_pool2d(a, 2))
    c = net.bridge(nn.functional.max_pool2d(b, 2))
    def up(t): return nn.functional.interpolate(t, scale_factor=2)
    d = net.up_path[1](b + up(c))
    e = net.up_path[0](a + up(d))
    for mine, plain in zip(net(x), [c, d, e], strict=True):
        np.testing.assert_array_equal(mine.detach(), plain.detach())
    assert torch.is_tensor(build(structure)(x))
    across = build([[[2, 3], nn.Conv2d(3, 3, 1), [3, 2]], [3, 3]])
    assert isinstance(across.middle_path[0], nn.Conv2d) and across(x).shape == (1, 2, 8, 12)
    for wrong in ([[[2, 3]], [3, 3]], [[[2, 3], [3, 2]], [[2, 3], [2], [3, 2]], [3, 3]], [[[2, 3], "32"], [3, 3]]):
        with pytest.raises(ValueError, match="structure"):
            build(wrong)
