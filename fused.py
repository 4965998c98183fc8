"""What the extension does in one pass of a training step on a CPU, in plain PyTorch elsewhere.

SiLU after a group norm for images with channels innermost, the layout in which convolutions are fastest; the squared
error; and Adam on float32 weights with the bfloat16 copies that matrix products read, and whose bfloat16 gradients it
takes as they are. Besides, convolutions that are matrix products, or become some.
"""
import copy
import math
import threading

import reparam

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
BLOCK = 2**17  # floats of Winograd planes, 0.5 MB, that a thread takes at a time, so that they stay in its cache
G = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24  # Winograd's
G2 = torch.kron(G, G)  # in both directions, kernels (9, ...) to (36, ...); csrc/tiles.cpp has the other two matrices
SCRATCH = threading.local()  # what `scratch` gave
BUILT = reparam.extension is not None and hasattr(torch.ops.pegasus, "winograd")  # an older build has none


def usable(x: Tensor) -> bool:
    """Whether the extension has kernels for a tensor."""
    return BUILT and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0


class NormSiLU(torch.autograd.Function):
    """The extension's kernels; x (B, C, H, W) in channels_last, weight and bias float32 (B, C)."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, epsilon):
        y, stats = torch.empty_like(x), weight.new_empty(2, len(x), groups)
        torch.ops.pegasus.silu_group_norm(x, weight, bias, y, stats, groups, epsilon)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.groups = groups
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, stats = ctx.saved_tensors
        dx, dweight, dbias = torch.empty_like(x), *weight.new_empty(2, *weight.shape)
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        torch.ops.pegasus.silu_group_norm_backward(dy, x, weight, bias, stats, dx, dweight, dbias, ctx.groups)
        return dx, dweight, dbias, None, None


def silu_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """SiLU(weight * (x - mean) / sqrt(variance + epsilon) + bias), moments over each image's groups of channels.

    x: (B, C, H, W). weight, bias: (C,), or (B, C) where images differ.
    """
    if not usable(x) or x.shape[1] % 16:
        if weight.dim() == 1:
            return functional.silu(functional.group_norm(x, groups, weight, bias, epsilon))
        y = functional.group_norm(x, groups, eps=epsilon)
        weight, bias = (each.to(y.dtype)[..., None, None] for each in (weight, bias))
        return functional.silu(torch.addcmul(bias, y, weight))
    affine = (each.float().expand(len(x), -1) for each in (weight, bias))
    return NormSiLU.apply(x.contiguous(memory_format=torch.channels_last), *affine, groups, epsilon)


class SquaredError(torch.autograd.Function):
    """The extension's kernels; logits and x contiguous, (B, ...)."""

    @staticmethod
    def forward(ctx, logits, x):
        sse = x.new_empty(len(x))
        torch.ops.pegasus.squared_error(logits, x, sse)
        ctx.save_for_backward(logits, x)
        return sse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsse):
        logits, x = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        torch.ops.pegasus.squared_error_backward(dsse.contiguous(), logits, x, dlogits)
        return dlogits, None


def squared_error(logits: Tensor, x: Tensor) -> Tensor:
    """sum (x - sigmoid(logits))^2 of each image, float32 (B,); logits and x, which is float32, (B, C, H, W)."""
    if not usable(logits) or x.dtype != torch.float32 or x.requires_grad or x[:1].numel() % 16:
        return (x - logits.float().sigmoid()).square().flatten(1).sum(1)
    return SquaredError.apply(logits.contiguous(), x.contiguous())


class Sequence(nn.Sequential):
    """nn.Sequential that computes a group norm and the SiLU after it in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        for before, layer, after in zip([None, *layers], layers, [*layers[1:], None], strict=False):
            if isinstance(layer, nn.GroupNorm) and isinstance(after, nn.SiLU):
                x = silu_group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
            elif not (isinstance(before, nn.GroupNorm) and isinstance(layer, nn.SiLU)):
                x = layer(x)
        return x


class Shrink(nn.Conv2d):
    """A convolution whose stride is its kernel size, without padding, as the matrix product that it is."""

    def forward(self, x: Tensor) -> Tensor:
        k = self.stride[0]
        patches = x.permute(0, 2, 3, 1).unflatten(2, (-1, k)).unflatten(1, (-1, k)).transpose(2, 3).flatten(3)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # contiguous patches, or `linear` copies it for every row
        return functional.linear(patches.contiguous(), weight, self.bias).permute(0, 3, 1, 2)


class Grow(nn.ConvTranspose2d):
    """The same of a transposed convolution, with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        k = self.stride[0]
        weight, bias = self.weight.permute(2, 3, 1, 0).flatten(0, 2), self.bias.repeat(k * k)
        patches = functional.linear(x.permute(0, 2, 3, 1).contiguous(), weight, bias).unflatten(3, (k, k, -1))
        return patches.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def scratch(name: str, *shape: int) -> Tensor:
    """A thread's float32 scratch memory for one purpose, reused: fresh pieces leave gaps, 30 MB of them in the end."""
    if name not in vars(SCRATCH) or vars(SCRATCH)[name].numel() < math.prod(shape):
        with torch.inference_mode(False), _disable_current_modes():  # which its next user may not be in
            vars(SCRATCH)[name] = torch.empty(math.prod(shape), dtype=torch.float32, device="cpu")
    return vars(SCRATCH)[name][:math.prod(shape)].view(shape)


def transformed(weight: Tensor, g: Tensor) -> Tensor:
    """A weight (K, C, 3, 3) by g (36, 9), (36, K, C)."""
    rows = scratch("rows", 3, 3, *weight.shape[:2]).copy_(weight.permute(2, 3, 0, 1)).view(9, -1)
    return torch.mm(g, rows, out=scratch("kernels", 36, rows.shape[1])).view(36, *weight.shape[:2])


def block(x: Tensor, weight: Tensor) -> int:
    """How many images (B, C, H, W) to take at a time."""
    return max(1, BLOCK * 16 // (36 * x[0, 0].numel() * max(weight.shape[:2])))


class Winograd(torch.autograd.Function):
    """A 3 x 3 convolution in tiles of 4 x 4: a quarter of the multiplications (Lavin and Gray 2016).

    x (B, C, H, W) in channels_last, weight (K, C, 3, 3), bias (K,) or empty.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias = len(bias) > 0
        size = len(x), len(weight), *x.shape[2:]
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        torch.ops.pegasus.winograd(x, transformed(weight, G2).transpose(1, 2), bias, y, block(x, weight))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy, dx = dy.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        turned, dkernels = transformed(weight, G2.flip(1)), scratch("dkernels", 36, weight[:, :, 0, 0].numel())
        torch.ops.pegasus.winograd_backward(dy, x, turned, dx, dkernels, block(x, weight))
        rows, dweight = scratch("rows", 3, 3, *weight.shape[:2]), torch.empty_like(weight)
        torch.mm(G2.T, dkernels, out=rows.view(9, -1))
        dbias = dy.sum((0, 2, 3)) if ctx.bias else weight.new_empty(0)
        return dx, dweight.copy_(rows.permute(2, 3, 0, 1)), dbias


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution of images with channels innermost, (B, C, H, W) to (B, K, H, W).

    In float32 on a CPU by Winograd's filtering, where channels are multiples of 16 and H and W of 4: then a training
    step of these networks takes two thirds of the time (docs/notes.md).
    """

    def __init__(self, before: int, after: int, bias: bool = True):
        super().__init__(before, after, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        single = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        fits = not (self.in_channels % 16 or self.out_channels % 16 or x.shape[2] % 4 or x.shape[3] % 4)
        if not (single and fits and usable(x) and torch.backends.mkl.is_available()):
            return super().forward(x)
        bias = self.weight.new_empty(0) if self.bias is None else self.bias
        return Winograd.apply(x.contiguous(memory_format=torch.channels_last), self.weight, bias)


def bfloat16_copy(network: nn.Module) -> nn.Module:
    """A copy of a network with bfloat16 weights in its linear layers and convolutions, sharing all other tensors."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    halves = {id(p): nn.Parameter(p.detach().bfloat16())
              for layer in network.modules() if isinstance(layer, PRODUCTS) for p in layer.parameters(recurse=False)}
    return copy.deepcopy(network, shared | halves)  # its memo: what to take instead of a copy


class Adam:
    """Adam (Kingma and Ba 2015) for a network's weights, by gradients of `trained`: that network or `bfloat16_copy`.

    Steps and checkpoints are those of torch.optim.Adam(fused=True), but any use of torch.optim imports torch's
    compiler, which takes a second and 70 MB. `lr`: a number or a tensor of one. `found_inf`, `grad_scale`: tensors of
    one number, or None; where `found_inf` is 1 nothing changes, and gradients are divided by `grad_scale`.
    """
    lr, beta1, beta2, epsilon = 1e-3, 0.9, 0.999, 1e-8
    found_inf = grad_scale = None

    def __init__(self, network: nn.Module, bfloat16: bool):
        self.built = BUILT and all(p.is_cpu for p in network.parameters())
        self.trained = bfloat16_copy(network) if self.built and bfloat16 else network
        self.pairs = list(zip(network.parameters(), self.trained.parameters(), strict=True))
        self.copies = [trained.detach() for _, trained in self.pairs]
        self.steps = torch.zeros((), device=self.copies[0].device)
        self.state = [{"step": self.steps, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                      for weight in network.parameters()]

    def state_dict(self) -> dict:
        return {"state": dict(enumerate(self.state))}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError or KeyError where it is another network's."""
        for i, moments in enumerate(self.state if state["state"] else ()):  # torch's has none before the first step
            for name, moment in moments.items():
                if moment.shape != state["state"][i][name].shape:
                    raise ValueError("optimizer and model differ in shape")
                moment.copy_(state["state"][i][name])

    def zero_grad(self) -> None:
        """As the network's own, which looks for its parameters each time and takes longer."""
        for _, trained in self.pairs:
            trained.grad = None

    def norm(self) -> Tensor:
        """The length of all gradients together, a tensor of one number."""
        grads = [trained.grad for _, trained in self.pairs]
        if not self.built:
            return torch.nn.utils.get_total_norm(grads)
        total, add_squares = torch.zeros((), dtype=torch.float32, device="cpu"), torch.ops.pegasus.add_squares.default
        for grad in grads:
            add_squares(grad, total)
        return total.sqrt()

    @torch.no_grad()
    def step(self) -> None:
        """The step that torch.optim.Adam(fused=True) takes."""
        if self.built:
            if not self.found_inf:
                self.one_pass()
            return
        steps, *moments = ([moments[name] for moments in self.state] for name in ("step", "exp_avg", "exp_avg_sq"))
        weights, grads = zip(*((weight, trained.grad) for weight, trained in self.pairs), strict=True)
        self.steps += 1
        torch._fused_adam_(weights, grads, *moments, [], steps, lr=self.lr, beta1=self.beta1, beta2=self.beta2,
                           weight_decay=0.0, eps=self.epsilon, amsgrad=False, maximize=False,
                           grad_scale=self.grad_scale, found_inf=self.found_inf)
        if self.found_inf is not None:
            self.steps -= self.found_inf

    def one_pass(self) -> None:
        """The step by the extension."""
        self.steps += 1
        steps = self.steps.item()
        scale = 1.0 if self.grad_scale is None else 1 / self.grad_scale.item()
        numbers = (float(self.lr) / (1 - self.beta1**steps), (1 - self.beta2**steps)**-0.5, self.beta1, self.beta2,
                   self.epsilon, scale)
        adam = torch.ops.pegasus.adam.default
        for (weight, trained), copied, moments in zip(self.pairs, self.copies, self.state, strict=True):
            adam(weight, trained.grad, moments["exp_avg"], moments["exp_avg_sq"], copied, *numbers)
