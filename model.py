"""The network, and Muon, an optimizer that relies on its batch normalisation.

A residual network of eight convolutions and a linear layer, David Page's ResNet-9:

    stage   layers                                             output         parameters
    prep    conv 3x3, BN, ReLU                                  64 x 32 x 32        1,856
    layer1  conv 3x3, max pool 2, BN, ReLU = X;  X + R(X)      128 x 16 x 16      369,408
    layer2  conv 3x3, max pool 2, BN, ReLU                     256 x  8 x  8      295,424
    layer3  conv 3x3, max pool 2, BN, ReLU = X;  X + R(X)      512 x  4 x  4    5,901,312
    pool    max pool, kernel 4, stride 2                       512 x  1 x  1            0
    fc      fully connected, softmax                            10                  5,130

with R = conv 3x3, BN, ReLU, conv 3x3, BN, ReLU: 6,573,130 parameters, and 379 million
multiply-accumulates per image. Pooling first leaves normalisation a quarter of the pixels to read.

    net = make_model(pick_device())
    optimizer = make_optimizer(net)            # a schedule sets its learning rate
"""
import torch
from torch import nn

# What training and the range test must share: otherwise the test would measure another setup.
MOMENTUM = {"muon": 0.6, "sgd": 0.9}           # Nesterov; 0.6 as in airbench94_muon, 0.9 was worse
WEIGHT_DECAY = 1e-3                            # not for Muon's convolutions: their norm is fixed
LOGIT_SCALE = 0.125                            # see CustomResNet.forward


def conv_bn_relu(channels_in, channels_out, pool=False):
    """conv 3x3 -> (max pool 2) -> BN -> ReLU: (B, channels_in, H, W) to (B, channels_out, H', W').

    The convolution has no bias: normalisation subtracts the mean, and any bias with it.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=1, padding=1, bias=False),
        *([nn.MaxPool2d(2)] if pool else []),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ResBlock(nn.Module):
    """x + R(x), where R is conv-BN-ReLU twice; the shape (B, channels, H, W) is unchanged."""

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(conv_bn_relu(channels, channels),
                                      conv_bn_relu(channels, channels))

    def forward(self, x):
        return x + self.residual(x)


class CustomResNet(nn.Module):
    """Normalised images (B, 3, 32, 32) to log-probabilities (B, classes), float32.

    width: channels of the first stage, 64 in the assignment; fewer make experiments quicker.
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

    def forward(self, x):                    # (B,   3, 32, 32)
        x = self.prep(x)                     # (B,  64, 32, 32)
        x = self.layer1(x)                   # (B, 128, 16, 16)
        x = self.layer2(x)                   # (B, 256,  8,  8)
        x = self.layer3(x)                   # (B, 512,  4,  4)
        x = self.pool(x).flatten(1)          # (B, 512)
        # Each feature is a maximum over 16 positions, hence large, and one step moves the logits
        # far: the softmax would be certain before it was right. Page's factor tempers it.
        logits = self.fc(x).float() * LOGIT_SCALE                                  # (B, C)
        # The logarithm of the softmax: .exp() gives probabilities, and the cross-entropy is minus
        # the entry of the right class (nll_loss). A log taken afterwards could be log(0).
        return logits.log_softmax(dim=1)                                           # (B, C)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, whose step is made orthogonal for some of the weights:

        v <- mu v + g                                    g the gradient (SGD: + decay w)
        w <- w - lr (g + mu v)                           SGD
        w <- w sqrt(n) / |w| - lr orthogonal(g + mu v)   groups with orthogonal=True, n rows

    A gradient is often large in few directions, where the loss is steep. SGD hardly moves in the
    others; an orthogonal step goes about equally far in all. Batch normalisation behind a
    convolution cancels any rescaling of its weights, so their norm is not decayed but fixed, at
    sqrt(n). That is also the norm of n orthonormal rows, so a step is about lr times as large as
    the weights (0.65 lr in `prep`, where 64 rows have only 27 numbers each).

        Muon([{"params": convolutions, "orthogonal": True}, {"params": others}], 0.1, 0.6, 1e-3)

    dtype: of the products in `orthogonal`. lr may be a tensor, as a CUDA graph requires.

    Source: Jordan et al., kellerjordan.github.io/posts/muon, 2024; the fixed norm and the three
    rounds are those of Jordan's airbench94_muon. torch.optim.Muon takes matrices only.
    """

    def __init__(self, params, lr, momentum, weight_decay, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "orthogonal": False, "dtype": dtype,
                                  "capturable": True})       # no value is read back: see train.py

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, mu = group["lr"], group["momentum"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad if group["orthogonal"] else w.grad.add(w, alpha=group["weight_decay"])
                if w not in self.state:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                v = self.state[w]["momentum_buffer"].mul_(mu).add_(g)
                step = g.add(v, alpha=mu)
                if group["orthogonal"]:
                    step = orthogonal(step.flatten(1), group["dtype"]).view_as(w).to(w.dtype)
                    w.mul_(len(w) ** 0.5 / w.norm().clamp(min=1e-7))
                w.sub_(step * lr)
        return loss


def orthogonal(matrix, dtype=torch.float32):
    """Roughly U V^T of a matrix U S V^T (its singular value decomposition): (n, m) to (n, m).

    No decomposition is computed. X X^T X = U S^3 V^T, so products alone can replace every singular
    value s by a s + b s^3 + c s^5. Jordan chose a, b and c to make small s grow fast: with s <= 1
    (the matrix is divided by its norm), three rounds map 0.02 .. 1 to 0.67 .. 1.21 (in bf16);
    smaller ones grow 41-fold at most. dtype: of the arithmetic and the result.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = len(matrix) > matrix.shape[1]
    x = (matrix / matrix.norm().clamp(min=1e-7)).to(dtype)        # now every s is at most 1
    x = x.T if tall else x                                        # X X^T is smaller than X^T X
    for _ in range(3):
        gram = x @ x.T                                            # G = X X^T
        # X <- a X + (b G + c G G) X
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


# ----------------------------------------------------- the lesson ends here; below, the setup

def pick_device():
    """A CUDA GPU, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precision(device):
    """The dtype to compute in. Native ones only: emulated bf16 is slower than float32."""
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
    """A fresh CustomResNet, the same for the same seed on every device."""
    torch.manual_seed(seed)
    net = CustomResNet(classes, width).to(device)
    # channels_last (NHWC in memory) is what tensor cores and oneDNN read fastest. Not on Apple's
    # GPUs, where its gradients were wrong before PyTorch's PR #188371 (June 2026).
    return net if device.type == "mps" else net.to(memory_format=torch.channels_last)


def make_optimizer(net, name="muon", lr=0.1):
    """Muon, or with name="sgd" the assignment's SGD, each with the constants of the recipe."""
    device = next(net.parameters()).device
    if name == "sgd":
        # A CUDA graph needs fused SGD. In fp16 that is unsafe: if the first step overflows, it
        # leaves its momentum uninitialised.
        fused = device.type == "cuda" and precision(device) != torch.float16
        return torch.optim.SGD(net.parameters(), lr, MOMENTUM[name], nesterov=True,
                               weight_decay=WEIGHT_DECAY, fused=fused)
    convolutions = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    others = [w for w in net.parameters() if not any(w is c for c in convolutions)]
    groups = [{"params": convolutions, "orthogonal": True}, {"params": others}]
    return Muon(groups, lr, MOMENTUM[name], WEIGHT_DECAY, precision(device))


def make_scaler(device):
    """Scales the loss so that fp16 gradients do not underflow; otherwise does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)
