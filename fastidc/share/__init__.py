"""A run made ready for others: a folder with a model card, one program that torch alone runs, or a repository on the Hugging Face Hub."""

from fastidc.share.folder import Exported, export
from fastidc.share.program import Program, export_program
from fastidc.share.push import push

__all__ = ["Exported", "Program", "export", "export_program", "push"]
