"""Native kernels: one kernel, one pair of files."""

if __name__ == "kernels":
    # The repository's root is on sys.path (`python -m bench.x`, pytest), before Hugging Face's package of this name,
    # which transformers imports. This package is `effc.kernels`, so the short name is theirs.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("the package `kernels` of Hugging Face is not installed", name=__name__)
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
