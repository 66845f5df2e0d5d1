"""One file per fused operation: reference first, Triton second, autograd third. Installed as `megatrain.kernels`."""

if __name__ == "kernels":
    raise ImportError("this folder is installed as megatrain.kernels: run `pip install -e .` and import megatrain.kernels")
