"""One file per fused operation: reference first, Triton second, autograd third. Installed as `megatrain.kernels`.

At the root of a checkout Python also finds this folder as `kernels`, the name of another project's package, for which libraries probe:
transformers reads its `__version__` and takes what is too old for not there. Nothing can be imported under that name.
"""

if __name__ == "kernels":
    __version__ = "0"
    __path__ = []
