"""Looking images up: every folder is listed once, however many images are asked for."""

import errno
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from fastidc.data.datasets.flaws import Flaw
from fastidc.errors import FastidcError


@cache
def extensions() -> frozenset[str]:
    """Lower-case file extensions, dot included, of the formats that Pillow reads."""
    from PIL import Image

    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in extensions()


def name_flaw(name: str, where: str, field: str | None = None, id_: str | None = None) -> Flaw | None:
    """What keeps ``name`` from being that of a file in one folder, if anything does: the folders in it, or a sign that no name has."""
    if "\0" in name or not name.strip():
        return Flaw("image-name", where, f"is {name!r}, and no file can be called so", "write the file's name", field=field, id=id_)
    if name in (".", "..") or "/" in name or os.sep in name:
        return Flaw("path-outside", where, f"is {name!r}, and a name without folders was expected", "take them out", field=field, id=id_)
    return None


class Files:
    """What lies in folders. A folder that is absent is an empty one."""

    def __init__(self):
        self._names: dict[str, frozenset[str]] = {}  # by text: hashing a Path costs more than the look-up
        self._stems: dict[Path, dict[str, list[str]]] = {}
        self._folded: dict[str, dict[str, str]] = {}

    def names(self, folder: str | Path) -> frozenset[str]:
        key = os.fspath(folder)
        if key not in self._names:
            try:
                self._names[key] = frozenset(os.listdir(key))
            except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that the system has no bytes for
                self._names[key] = frozenset()
            except OSError as error:
                if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                    self._names[key] = frozenset()
                    return self._names[key]
                raise FastidcError(f"{key}: the folder cannot be listed ({error.strerror}); see to its permissions.") from None
        return self._names[key]

    def stems(self, folder: Path) -> dict[str, list[str]]:
        """Name without extension -> image files of that name, sorted."""
        if folder not in self._stems:
            table: dict[str, list[str]] = {}
            for name in sorted(filter(is_image, self.names(folder))):
                table.setdefault(os.path.splitext(name)[0], []).append(name)
            self._stems[folder] = table
        return self._stems[folder]

    def by_stem(self, folder: Path, stem: str, where: str, field: str | None = None) -> Path | None:
        """The one image of that name in whatever format, None if there is none; Flaw where there are several."""
        same = self.stems(folder).get(stem, [])
        if len(same) > 1:
            what = f"may mean either: both {' and '.join(same)} lie in {folder}"
            raise Flaw("image-twice", where, what, "keep one of them", field=field)
        return folder / same[0] if same else None

    def otherwise(self, folder: str | Path, name: str) -> str | None:
        """A file of ``folder`` that is called as ``name`` but for capitals (with any extension where ``name`` has none), if there is one."""
        key = os.fspath(folder)
        if key not in self._folded:
            table = {}
            for other in sorted(self.names(key), reverse=True):
                table[os.path.splitext(other)[0].lower()] = table[other.lower()] = other
            self._folded[key] = table
        return self._folded[key].get(name.lower())

    def missing(self, path: Path, where: str, fix: str, field: str | None = None, shown: str = "") -> Flaw:
        """That the image ``path`` is not there, with a hint where only its capitals differ. ``shown``: what sentences say for its extension."""
        other = self.otherwise(path.parent, path.name)
        fix = f"{other} is there, whose capitals differ: rename one of the two" if other is not None else fix
        kind = "image-missing" if other is None else "image-capitals"
        return Flaw(kind, where, "image is missing", fix, field=field, image=path.parent / f"{path.name}{shown}")

    def image(self, folder: Path, name: str, where: str, other_extension: bool = True, field: str | None = None) -> Path:
        """The file ``name`` of ``folder``, or in a folder of it; failing it, the one image of the same name with another (case of the) extension."""
        path = folder / name
        parent, last = os.path.split(os.fspath(path))
        if last in self.names(parent):
            return path
        found = self.by_stem(path.parent, path.stem, where, field) if other_extension else None
        if found is None:
            raise self.missing(path, where, "put it there, or name the folder of images with --images", field)
        return found


def image_folder(files: Files, images: Path | None, folders: Iterable[Path], stem: str | None) -> Path:
    """Where a data set's images lie: ``images`` if given, else the first of ``folders`` that has an image called ``stem``.

    If none has, the first that exists: the error about the missing image then names a likely place.
    """
    if images is not None:
        return images
    present = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    return next((folder for folder in present if stem in files.stems(folder)), present[0])
