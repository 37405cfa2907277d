"""A plain two-tower model with CLIP's shapes, so that the benchmarks need no other library."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # the layers that KeepLoRA's public CLIP runs adapt


@dataclass(frozen=True)
class Size:
    """Shapes of a model; no text tower with ``text_blocks`` 0."""

    image: int = 224
    patch: int = 16
    width: int = 768
    blocks: int = 12
    text_width: int = 512
    text_blocks: int = 12
    text_length: int = 77
    vocabulary: int = 49408
    joint: int = 512


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, width // 64, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ImageTower(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        tokens = (size.image // size.patch) ** 2 + 1
        self.patches = nn.Conv2d(3, size.width, size.patch, size.patch)
        self.first = nn.Parameter(torch.zeros(1, 1, size.width))
        self.positions = nn.Parameter(torch.randn(tokens, size.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(size.width, causal=False) for _ in range(size.blocks)))
        self.norm, self.projection = nn.LayerNorm(size.width), nn.Linear(size.width, size.joint, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.positions
        # CLIP takes the class token; with the mean every block's layers see gradients of all tokens, as the inner
        # blocks of a deep tower do, also where a benchmark affords one block only.
        return self.projection(self.norm(self.blocks(x).mean(1)))


class TextTower(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.text_width)
        self.positions = nn.Parameter(torch.randn(size.text_length, size.text_width) * 0.02)
        self.blocks = nn.Sequential(*(Block(size.text_width, causal=True) for _ in range(size.text_blocks)))
        self.norm, self.projection = nn.LayerNorm(size.text_width), nn.Linear(size.text_width, size.joint, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.projection(self.norm(self.blocks(self.embedding(ids) + self.positions)[:, -1]))


class Clip(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.visual, self.text = ImageTower(size), TextTower(size)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        left, right = (F.normalize(y, dim=-1) for y in (self.visual(images), self.text(ids)))
        return 100 * left @ right.T


def pairs_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """CLIP's contrastive loss, one direction."""
    images, ids = batch
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        logits = model(images, ids)
    return F.cross_entropy(logits.float(), torch.arange(len(images), device=images.device))


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Classification by the image tower's outputs."""
    images, labels = batch
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels)


def adapted(model: nn.Module) -> list[str]:
    """Names of the layers that get an adapter."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ATTENTION]


@torch.no_grad()
def give_decaying_spectra(model: nn.Module) -> None:
    """Make the adapted weights' singular values fall as ~ 1/sqrt(i); those of fresh layers are nearly equal."""
    for name in adapted(model):
        weight = model.get_parameter(f"{name}.weight")
        frame = torch.linalg.qr(torch.randn_like(weight)).Q
        scale = torch.arange(1, weight.shape[1] + 1, device=weight.device) ** -0.5
        weight.copy_(weight @ (frame * (scale / scale.square().mean().sqrt())) @ frame.T)
