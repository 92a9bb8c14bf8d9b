"""The network, and Muon, the optimizer that its batch normalisation allows.

A residual network of eight convolutions:

    stage   layers                                             output (C x H x W)
    prep    conv 3x3, BN, ReLU                                  64 x 32 x 32
    layer1  conv 3x3, max pool 2, BN, ReLU = X;  X + R(X)      128 x 16 x 16
    layer2  conv 3x3, max pool 2, BN, ReLU                     256 x  8 x  8
    layer3  conv 3x3, max pool 2, BN, ReLU = X;  X + R(X)      512 x  4 x  4
    pool    max pool, kernel 4, stride 2                       512 x  1 x  1
    fc      fully connected, softmax                            10

with R = conv 3x3, BN, ReLU, conv 3x3, BN, ReLU. Each layer halves the picture and doubles the
channels, so that the first convolutions of all three cost the same. Pooling stands *before* batch
normalisation, which has a quarter of the pixels to read. The shape is David Page's ResNet-9.

    model = make_model(pick_device())
    optimizer = make_optimizer(model)          # a schedule sets its learning rate

    python model.py        prints the table with parameters and multiply-accumulates
"""
from collections import Counter

import torch
from torch import nn

# What training and the range test must share, or the test would answer for another training.
MOMENTUM = 0.6            # Nesterov; as in airbench94_muon
WEIGHT_DECAY = 1e-3       # of all but the convolutions, whose length Muon keeps
LOGIT_SCALE = 0.125       # see CustomResNet.forward


def conv_bn_relu(channels_in, channels_out, pool=False):
    """conv 3x3 -> (max pool 2) -> BN -> ReLU: (B, channels_in, H, W) to (B, channels_out, H', W').

    The convolution has no bias: batch normalisation subtracts the mean, and any bias with it.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=1, padding=1, bias=False),
        *([nn.MaxPool2d(2)] if pool else []),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ResBlock(nn.Module):
    """x + R(x) with R two conv-BN-ReLU; the shape (B, channels, H, W) stays."""

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(conv_bn_relu(channels, channels),
                                      conv_bn_relu(channels, channels))

    def forward(self, x):
        return x + self.residual(x)


class CustomResNet(nn.Module):
    """Normalised images (B, 3, 32, 32) to log-probabilities (B, classes), float32.

    width: channels of the first stage. 64 is the specification; 32 trains about four times as fast.
    """

    def __init__(self, classes=10, width=64):
        super().__init__()
        w = width
        self.prep = conv_bn_relu(3, w)
        self.layer1 = nn.Sequential(conv_bn_relu(w, 2 * w, pool=True), ResBlock(2 * w))
        self.layer2 = conv_bn_relu(2 * w, 4 * w, pool=True)
        self.layer3 = nn.Sequential(conv_bn_relu(4 * w, 8 * w, pool=True), ResBlock(8 * w))
        self.pool = nn.MaxPool2d(kernel_size=4, stride=2)
        self.fc = nn.Linear(8 * w, classes)

    def forward(self, x):                    # (B,   3, 32, 32), B images
        x = self.prep(x)                     # (B,  64, 32, 32)
        x = self.layer1(x)                   # (B, 128, 16, 16)
        x = self.layer2(x)                   # (B, 256,  8,  8)
        x = self.layer3(x)                   # (B, 512,  4,  4)
        x = self.pool(x).flatten(1)          # (B, 512)
        # fc adds up 512 features, each a maximum over 16 places, so that its logits grow large; a
        # softmax of large logits is sure before it knows anything. Page's constant factor helps.
        logits = self.fc(x).float() * LOGIT_SCALE                                  # (B, C)
        # The softmax as its logarithm: .exp() gives probabilities, and the cross-entropy loss is
        # simply minus the right class's entry, nll_loss. A log of a softmax could be log(0).
        return logits.log_softmax(dim=1)                                           # (B, C)


def orthogonal(matrix, dtype=torch.float32):
    """About U V^T of a matrix U S V^T, its singular value decomposition, without computing that.

    (n, m) float32 to (n, m) of `dtype`, the arithmetic's. Three steps of a Newton-Schulz iteration:
    as X X^T X = U S^3 V^T, products alone take every singular value s to a s + b s^3 + c s^5. With
    Jordan's a, b and c, values from 0.02 to 1 of the matrix's length (Frobenius norm) end within
    0.68 .. 1.21; smaller ones grow up to 41-fold.
    """
    x = (matrix / matrix.norm().clamp(min=1e-7)).to(dtype)        # now all s are 1 or less
    x = x.T if len(matrix) > matrix.shape[1] else x               # the smaller of X X^T and X^T X
    for _ in range(3):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)   # b XX' + c (XX')^2
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x.T if len(matrix) > matrix.shape[1] else x


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum and weight decay, in which convolutions take this step instead:

        v <- mu v + g                                              g the gradient, v its momentum
        w <- w sqrt(n) / |w| - lr orthogonal(g + mu v)             n channels out

    Most of a gradient's length lies in the few directions in which the loss is steep; a step made
    orthogonal goes about as far in the others too. Batch normalisation behind a convolution undoes
    any change of its weights' length, so this is not decayed but fixed, at sqrt(n). n orthonormal
    rows have the same length, so a step is about lr times as long as the weights (for the first
    convolution, whose 64 rows have only 27 columns, sqrt(27 / 64) of that).

    Each convolution must have batch normalisation behind it. The other options are SGD's; lr may
    be a tensor, as a CUDA graph needs it, where fused=True.

    Jordan et al., kellerjordan.github.io/posts/muon, 2024; the fixed length and three iterations as
    in Jordan's airbench94_muon. torch.optim.Muon takes matrices only, and decays their length.
    """

    def __init__(self, parameters, lr, momentum, weight_decay, **options):
        parameters = list(parameters)
        convolutions = [w for w in parameters if w.dim() == 4]            # (n, channels in, 3, 3)
        others = [w for w in parameters if w.dim() != 4]
        groups = [{"params": convolutions, "orthogonal": True}, {"params": others}]
        super().__init__([group for group in groups if group["params"]], lr, momentum,
                         nesterov=True, weight_decay=weight_decay, **options)
        # Fused SGD offers a GradScaler to divide the gradients, and to skip a bad step, itself.
        # orthogonal_step does neither, so the scaler is to do both, as for other optimizers.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups                            # all; SGD's own step gets the rest
        for group in groups:
            if group.get("orthogonal"):
                for w in group["params"]:
                    if w.grad is not None:
                        self.orthogonal_step(w, group)
        try:
            self.param_groups = [group for group in groups if not group.get("orthogonal")]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def orthogonal_step(self, w, group):
        """The formula above for one convolution."""
        if "momentum_buffer" not in self.state[w]:
            self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        v = self.state[w]["momentum_buffer"]
        gradient = -w.grad if group["maximize"] else w.grad
        v.mul_(group["momentum"]).add_(gradient)
        matrix = gradient.add(v, alpha=group["momentum"]).flatten(1)          # (n, channels in * 9)
        direction = orthogonal(matrix, precision(w.device)).view_as(w)
        w.mul_(len(w) ** 0.5 / w.norm().clamp(min=1e-7))
        # In float32: bf16 times a tensor on CUDA would round the rate to bf16 first.
        w.sub_(direction.float() * group["lr"])


def pick_device():
    """A CUDA GPU, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precision(device):
    """The dtype of the arithmetic. Native ones only: emulated bf16 is slower than float32."""
    if device.type == "cuda":
        return (torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16)
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(device):
    """The context of a forward pass: convolutions in precision(device), weights in float32."""
    dtype = precision(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_model(device, seed=0, classes=10, width=64):
    """A fresh CustomResNet, the same for the same seed on every device, channels_last."""
    torch.manual_seed(seed)
    # channels_last (NHWC in memory) is what tensor cores and oneDNN's convolutions read fastest.
    return CustomResNet(classes, width).to(device, memory_format=torch.channels_last)


def make_optimizer(model, lr=0.1):
    """Muon with the recipe's constants; what it leaves to SGD, on CUDA in one fused kernel.

    Not in fp16: where a first step overflows, fused SGD leaves its momentum uninitialised.
    """
    device = next(model.parameters()).device
    fused = device.type == "cuda" and precision(device) != torch.float16
    return Muon(model.parameters(), lr, MOMENTUM, WEIGHT_DECAY, fused=fused)


def make_scaler(device):
    """Scales the loss so that fp16 gradients do not underflow; otherwise does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)


def main():
    model, macs = CustomResNet(), Counter()

    def count(module, inputs, output):
        # Each weight is used once at each output position: H x W of them in a convolution.
        macs[module] += module.weight.numel() * output[0, 0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    x = torch.zeros(2, 3, 32, 32)
    print(f"{'stage':8}{'output':>14}{'parameters':>14}{'MACs':>14}")
    for name, stage in model.named_children():
        x = stage(x.flatten(1) if name == "fc" else x)
        shape = " x ".join(str(n) for n in x.shape[1:])
        parameters = sum(p.numel() for p in stage.parameters())
        print(f"{name:8}{shape:>14}{parameters:14,}"
              f"{sum(macs[module] for module in stage.modules()):14,}")
    print(f"{'all':22}{sum(p.numel() for p in model.parameters()):14,}{macs.total():14,}")


if __name__ == "__main__":
    main()
