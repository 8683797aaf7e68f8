"""Rows in, Records out: files, folders and datasets of any common kind and shape, every bad row named."""

from instil.data.records import Records, Report, read
from instil.data.shapes import SHAPES

__all__ = ["SHAPES", "Records", "Report", "read"]
