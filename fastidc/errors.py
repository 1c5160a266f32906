"""The exceptions that a user is meant to read."""


class FastidcError(ValueError):
    """Bad input: one sentence that names the file, index and field, and the way out.

    The command line prints it without a traceback and exits with code 2; a caller of the library catches a ``ValueError``.
    """


class LostPeerError(FastidcError):
    """Another process of this run is gone or silent. Of several processes the first one speaks for all; this every one says for itself."""
