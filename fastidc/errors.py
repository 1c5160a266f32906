"""The exceptions that a user is meant to read."""


class FastidcError(ValueError):
    """Bad input: one sentence that names the file, index and field, and the way out.

    The command line prints it without a traceback and exits with code 2; a caller of the library catches a ``ValueError``.
    """


class LostPeerError(FastidcError):
    """Another process of this run is gone or silent. Of several processes the first one speaks for all; this every one says for itself."""


class NotFiniteError(FastidcError):
    """A loss or its gradient is not finite, more often than a run puts up with."""


class Interrupted(Exception):  # noqa: N818
    """A run that ended at a signal and can go on. ``code``: the exit code, 128 + the signal's number, or 75 at a pre-emption signal."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code
