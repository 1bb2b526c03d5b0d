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
    if spec is not None and spec.loader is not None:  # else transformers sees no version, and leaves it
        sys.modules[__name__] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[__name__])
