"""What tests of whole builds hold in their hands: a build folder, and what a command left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """What one command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines in which the command complains (the others are progress)."""
        return [line for line in self.err.splitlines() if line.startswith("edgestill: ")]


Command = Callable[..., Done]


@dataclass(frozen=True)
class Build:
    """A folder with a recipe, a profile called `device`, the material and `out`."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def bundle(self) -> Path:
        return self.out / "device"

    @property
    def arguments(self) -> list[str]:
        """Of `edgestill`, to build it (again)."""
        recipe, profile = self.folder / "recipe.yaml", self.folder / "device.yaml"
        return ["build", str(recipe), "--profile", str(profile), "--out", str(self.out)]

    def stage(self, name: str) -> Path:
        """The folder of a finished stage."""
        (found,) = (p for p in (self.out / "work").glob(f"{name}-*") if not p.name.endswith(".partial"))
        return found

    def kept(self) -> set[str]:
        """Names of the finished stages, without their keys."""
        folders = (self.out / "work").iterdir()
        return {p.name.rpartition("-")[0] for p in folders if not p.name.endswith(".partial")}

    def without(self, *stages: str, folder: Path) -> Build:
        """A copy in `folder` as it was before these stages were done; it has no bundle."""
        shutil.copytree(self.folder, folder)
        copy = Build(folder)
        shutil.rmtree(copy.bundle)
        for name in stages:
            shutil.rmtree(copy.stage(name))
        return copy
