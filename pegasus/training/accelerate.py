"""Layers of a network swapped for faster ones on a CPU, with the same weights and keys.

In float32, 3 x 3 convolutions take Winograd's filtering. A group norm and the SiLU after
it are one pass, for images with channels innermost, the layout in which convolutions are
fastest. docs/machines.md has what each brings. Without the extension `pegasus_step`, or on
a GPU, networks stay as they are.
"""
import os
from collections.abc import Callable

from pegasus.models.flow_prior import ModulatedNorm

import torch
from torch import Tensor, nn

available = False
if os.environ.get("PEGASUS_EXTENSION", "1") != "0":
    try:
        import pegasus_step  # noqa: F401

        available = True
    except ImportError:
        pass

ops = torch.ops.pegasus_step
LANES = 16  # channels have to be a multiple
BLOCK = 2**17  # floats of Winograd planes that a thread takes at a time: its cache


class NormSiLUFunction(torch.autograd.Function):
    """silu(group norm): x (B, C, H, W) in channels_last, weight and bias float32 (B, C)."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        y = torch.empty_like(x)
        stats = weight.new_empty(2, len(x), groups)
        ops.silu_group_norm(x, weight, bias, y, stats, groups, eps)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.groups = groups
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, stats = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = weight.new_empty(weight.shape)
        dbias = weight.new_empty(weight.shape)
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        ops.silu_group_norm_backward(dy, x, weight, bias, stats, dx, dweight, dbias, ctx.groups)
        return dx, dweight, dbias, None, None


def fits(x: Tensor) -> bool:
    """Return whether there are kernels for a tensor (B, C, ...)."""
    known = x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)
    return known and x.numel() > 0 and x.shape[1] % LANES == 0


def silu_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return silu(weight * norm(x) + bias) of x (B, C, H, W), weight and bias (C,) or (B, C)."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.float().expand(len(x), -1)
    bias = bias.float().expand(len(x), -1)
    return NormSiLUFunction.apply(x, weight, bias, groups, eps)


class NormSiLUSequential(nn.Sequential):
    """nn.Sequential that computes a group norm and the SiLU after it in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        i = 0
        while i < len(layers):
            layer = layers[i]
            if is_norm_silu(layers[i : i + 2]) and fits(x):
                x = silu_group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
                i += 2
            else:
                x = layer(x)
                i += 1
        return x


def is_norm_silu(layers: list[nn.Module]) -> bool:
    return [type(layer) for layer in layers] == [nn.GroupNorm, nn.SiLU]


class FastModulatedNorm(ModulatedNorm):
    """silu(scale * norm(x) + shift) in one pass."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if not fits(x):
            return super().forward(x, scale, shift)
        return silu_group_norm(x, self.groups, scale, shift, self.eps)


def images_per_block(x: Tensor, weight: Tensor) -> int:
    """Return how many images (B, C, H, W) to take at a time."""
    places = x[0, 0].numel()
    return max(1, BLOCK * 16 // (36 * places * max(weight.shape[:2])))


class WinogradFunction(torch.autograd.Function):
    """A 3 x 3 convolution in tiles of 4 x 4: a quarter of the multiplications.

    Lavin and Gray 2016. x (B, C, H, W) in channels_last, weight (K, C, 3, 3), bias (K,)
    or empty.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        weight = weight.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        shape = (len(x), len(weight), *x.shape[2:])
        y = torch.empty(
            shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        ops.winograd(x, weight, bias, y, images_per_block(x, weight))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dweight = torch.empty_like(weight)
        ops.winograd_backward(dy, x, weight, dx, dweight, images_per_block(x, weight))
        dbias = dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution by Winograd's filtering, in float32 and where sizes fit."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.suits(x):
            return super().forward(x)
        bias = self.weight.new_empty(0) if self.bias is None else self.bias
        x = x.contiguous(memory_format=torch.channels_last)
        return WinogradFunction.apply(x, self.weight, bias)

    def suits(self, x: Tensor) -> bool:
        single = x.dtype == self.weight.dtype == torch.float32
        if not single or torch.is_autocast_enabled("cpu") or not fits(x):
            return False
        return x.shape[2] % 4 == 0 and x.shape[3] % 4 == 0


def suits_winograd(layer: nn.Module) -> bool:
    """Return whether a layer is a plain 3 x 3 convolution of fitting channels."""
    if not available or type(layer) is not nn.Conv2d or not torch.backends.mkl.is_available():
        return False
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1)) and layer.padding_mode == "zeros"
    channels = layer.in_channels % LANES == 0 and layer.out_channels % LANES == 0
    return plain and channels and layer.groups == 1


def faster(layer: nn.Module) -> nn.Module:
    """Return a faster layer with the same parameters, or the layer itself."""
    if suits_winograd(layer):
        sizes = (layer.in_channels, layer.out_channels)
        fast = WinogradConv2d(*sizes, 3, padding=1, bias=layer.bias is not None, device="meta")
        fast.weight = layer.weight
        fast.bias = layer.bias
        return fast
    if type(layer) is nn.Sequential:
        return NormSiLUSequential(*layer)
    if type(layer) is ModulatedNorm:
        return FastModulatedNorm()
    return layer


def swap_layers(model: nn.Module, swap: Callable[[nn.Module], nn.Module] = faster) -> None:
    for name, layer in list(model.named_children()):
        swap_layers(layer, swap)
        setattr(model, name, swap(layer))


def accelerate(model: nn.Module) -> None:
    """Swap layers of a network on the CPU for faster ones, in place."""
    on_cpu = all(parameter.is_cpu for parameter in model.parameters())
    if available and on_cpu:
        swap_layers(model)
        model.to(memory_format=torch.channels_last)
