"""The errors a user can meet; each says what was found, what was expected, where, and what to do."""


class EdgeqError(Exception):
    """Base of every error that edgeq raises on purpose."""


class FormatError(EdgeqError, ValueError):
    """A file is malformed, truncated, of another kind, or asks for something edgeq does not support.

    Parameters
    ----------
    path : the file (or folder) that was read.
    where : the tensor, key or byte range in it, e.g. ``"tensor blk.0.attn_q.weight"``; ``""`` for the whole
    file. found, expected : what stood there, and what should have stood there. hint : what the user can do
    about it.
    """

    def __init__(self, path: object, where: str, *, found: str, expected: str, hint: str = "") -> None:
        self.path, self.where, self.found, self.expected, self.hint = str(path), where, found, expected, hint
        at = f"{path}: {where}" if where else str(path)
        super().__init__(f"{at}: found {found}, expected {expected}" + (f". {hint}" if hint else ""))


class ContextFull(EdgeqError):
    """The prompt and the answer do not fit the context; raised unless shifting was asked for."""


class ModelNotFound(EdgeqError):
    """No file, folder, catalog name or downloadable source answers to the name that was given."""
