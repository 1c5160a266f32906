"""One module per data set, each a `fastidc.data.datasets.base.Reader`; `fastidc.data.records` chooses among them.

``recognise(root)`` says by which file it knows its layout, or None; ``parse(root, images, report, sink)`` reads its annotations and says where
each image is, without looking for one. What is wrong goes to ``sink`` (`fastidc.data.datasets.flaws`): training's raises the first, that of
`fastidc check` keeps all, and after either the reader goes on without what was flawed.
"""
