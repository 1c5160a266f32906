"""Mini CLEVR-Change: our own ray-caster and caption grammar, written as the released data set's file tree."""

from fastidc.data.render.config import RenderConfig
from fastidc.data.render.writer import render_dataset

__all__ = ["RenderConfig", "render_dataset"]
