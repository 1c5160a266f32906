"""A run on one page: curves, scores, pairs beside their captions and what the model looked at."""

from fastidc.report.page import Card, Cell, Hit, Page, Query, Table, render, write_page
from fastidc.report.run import write_run_report
from fastidc.report.thumbnails import Thumbnail

__all__ = ["Card", "Cell", "Hit", "Page", "Query", "Table", "Thumbnail", "render", "write_page", "write_run_report"]
