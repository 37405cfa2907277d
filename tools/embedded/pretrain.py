"""Pretrain the embedded CLIP from scratch on the rendered corpus: `python -m tools.embedded.pretrain --help`."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keeplora.tasks.classification import accuracy, normalize
from keeplora.tasks.embedded import build_model, load_tasks, save_model
from keeplora.tasks.embedded.render import COLOURS, Look, draw, named_colours
from keeplora.tasks.embedded.tokenizer import Tokenizer
from tools.embedded.corpus import WEIGHTS

CONTEXT = 10
LOOK = Look(tilt=8.0, extent=(0.6, 0.95), shift=2.5, noise=(0.0, 35.0), noisy=0.25, blur=0.2, plain=0.4, contrast=70.0)
NAMED = 0.35  # share of the one-colour glyphs painted in a named colour
SPOKEN = 0.15  # share of those whose caption says so


def config(vocabulary: int) -> dict[str, object]:
    """Arguments of `open_clip.model.CLIP`."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 6, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 4,
        },
    }  # fmt: skip


@dataclass
class Sampler:
    """Draws batches: rendered images, distinct captions, and which caption each image has."""

    masks: npt.NDArray[np.uint8]
    pictures: npt.NDArray[np.uint8]
    captions: list[list[str]]
    probability: npt.NDArray[np.float64]
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.starts = np.cumsum([0, *(len(c) for c in self.captions)])
        flat = [text for texts in self.captions for text in texts]
        self.tokens = self.tokenizer(flat).numpy()
        self.colour_ids = np.array([self.tokenizer([c])[0, 1].item() for c in COLOURS])

    @classmethod
    def from_files(cls, corpus: Path) -> Sampler:
        stored = np.load(corpus / "corpus.npz")
        texts = json.loads((corpus / "captions.json").read_text(encoding="utf8"))
        captions, source = texts["captions"], np.array(texts["source"])
        distinct = sorted({text for entry in captions for text in entry} | set(COLOURS) | {c + " x" for c in COLOURS})
        weight = np.zeros(len(source))
        for name, share in WEIGHTS.items():
            weight[source == name] = share / (source == name).sum()
        tokenizer = Tokenizer.from_texts(distinct, context=CONTEXT, least=2)
        return cls(stored["masks"], stored["pictures"], captions, weight / weight.sum(), tokenizer)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images uint8 [size, 3, 32, 32], tokens [distinct, context], caption of each image [size]."""
        chosen = np.sort(rng.choice(len(self.captions), size, replace=False, p=self.probability))
        flat = chosen[chosen < len(self.masks)]
        rich = chosen[chosen >= len(self.masks)] - len(self.masks)
        tokens = self.tokens[rng.integers(self.starts[chosen], self.starts[chosen + 1])]
        colour = rng.integers(0, len(COLOURS), len(flat))
        named = rng.random(len(flat)) < NAMED
        images = [self._paint(flat[~named], None, rng), self._paint(flat[named], colour[named], rng)]
        if len(rich):
            images.append(draw(self.pictures[rich], LOOK, rng))
        spoken = named & (rng.random(len(flat)) < SPOKEN)
        head = tokens[: len(flat)]
        longer = np.concatenate([head[:, :1], self.colour_ids[colour][:, None], head[:, 1:-1]], 1)
        fits = spoken & (head[:, -1] == 0)
        tokens[: len(flat)] = np.where(fits[:, None], longer, head)
        # Images were drawn unnamed first, then named, then emoji: put the captions in the same order.
        order = np.concatenate([np.flatnonzero(~named), np.flatnonzero(named), np.arange(len(flat), size)])
        distinct, which = np.unique(tokens[order], axis=0, return_inverse=True)
        return torch.cat(images), torch.from_numpy(distinct), torch.from_numpy(which.reshape(-1))

    def _paint(
        self, indices: npt.NDArray[np.int64], colour: npt.NDArray[np.int64] | None, rng: np.random.Generator
    ) -> Tensor:
        if colour is None:
            return draw(self.masks[indices], LOOK, rng)
        front = named_colours(colour, rng)
        # Named colours stand on white, on black, or on anything far enough in grey.
        back = np.where(front.mean(-1, keepdims=True) > 140, 0.0, 255.0).astype(np.float32).repeat(3, 1)
        loose = rng.random(len(front)) < 0.4
        back[loose] = rng.integers(0, 256, (int(loose.sum()), 3))
        return draw(self.masks[indices], LOOK, rng, front=front, back=back)


def contrastive(images: Tensor, texts: Tensor, which: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over distinct captions: every image of a caption is a positive of it."""
    logits = scale.exp().clamp(max=100) * images @ texts.T
    rows = torch.arange(len(which))
    by_image = -F.log_softmax(logits, dim=1)[rows, which].mean()
    by_text = -F.log_softmax(logits, dim=0)[rows, which].mean()
    return (by_image + by_text) / 2


def zero_shot(model: torch.nn.Module) -> dict[str, float]:
    tasks, witness = load_tasks()
    return {t.name: round(accuracy(model, t, "test"), 1) for t in [*tasks, witness]}


def pretrain(corpus: Path, out: Path, *, steps: int, size: int, rate: float, save_every: int, evaluate: bool) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sampler = Sampler.from_files(corpus)
    settings = config(len(sampler.tokenizer))
    model = build_model(settings).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.06)
    print(f"{len(sampler.captions)} glyphs, {len(sampler.tokenizer)} words, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)  # fmt: skip
    start, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        images, tokens, which = sampler.batch(size, rng)
        # Attention written out beats the fused kernel here: its backward is slow on sequences of 17 tokens.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16):
            image_features = model.encode_image(normalize(images), normalize=True)
            text_features = model.encode_text(tokens, normalize=True)
        loss = contrastive(image_features.float(), text_features.float(), which, model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step} loss {total / 100:.3f} scale {model.logit_scale.exp().item():.1f} "
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
            total = 0.0
        if step % save_every == 0 or step == steps:
            save_model(model, settings, sampler.tokenizer, out)
            if evaluate:
                print(step, zero_shot(model), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="directory written by tools.embedded.build")
    parser.add_argument("--out", type=Path, required=True, help="directory for model.safetensors and its JSON files")
    parser.add_argument("--steps", type=int, default=8500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="print zero-shot accuracies at every save")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretrain(args.corpus, args.out, steps=args.steps, size=args.batch, rate=args.lr, save_every=args.save_every,
             evaluate=args.evaluate)  # fmt: skip


if __name__ == "__main__":
    main()
