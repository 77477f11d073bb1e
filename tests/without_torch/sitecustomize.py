"""Where Python begins in commands that tests start (`commands.environment`): torch is not found."""

import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Not None in sys.modules, which `datasets` takes for a torch that was imported."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


sys.meta_path[:] = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
