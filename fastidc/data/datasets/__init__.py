"""One module per data set, each with functions of the same names; `fastidc.data.records.load_records` chooses among them.

``recognise(root)`` says by which file it knows its layout, or None; ``annotations(root, ...)`` parses its files without looking for an
image (CLEVR-Change: ``splits``, ``sentences`` and ``types``, a file each); ``load(root, images, empty, report)`` returns records.
"""
