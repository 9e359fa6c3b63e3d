"""Hugging Face checkpoints in and out: load, save, export to GGUF."""

from .gguf import export_gguf
from .load import from_pretrained
from .save import save_pretrained

__all__ = ["export_gguf", "from_pretrained", "save_pretrained"]
