"""Imports a module of ours after another library's, whenever that comes, so that neither pays for the other alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(library: str, ours: str) -> None:
    """Import module `ours` now if `library` has been imported, else right after it will be."""
    if library in sys.modules:
        import_module(ours)
    else:
        sys.meta_path.insert(0, _After(library, ours))


class _After(MetaPathFinder):
    """Finds the library as the other finders do, with one more import behind its loading."""

    def __init__(self, library: str, ours: str) -> None:
        self.library, self.ours = library, ours

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the library, None for any other name. To ask for a spec is not yet to import."""
        if name != self.library:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _After) or finder.library != name]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_both(module: ModuleType) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                import_module(self.ours)

            setattr(spec.loader, "exec_module", load_both)  # noqa: B010  (mypy: methods are not assigned to)
        return spec
