"""KeepLoRA in four training loops: ``python -m examples.plain_pytorch``, and so on. Explained in docs/loops.md."""
