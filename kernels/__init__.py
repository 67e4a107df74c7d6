"""Kernels of nabla_tau, one op a file; installed as `nabla_tau.kernels`. Imports torch and triton only."""

if __name__ == "kernels":
    # Run from the repository's root, `import kernels` would otherwise find this folder, and shadow the
    # package of that name that Hugging Face publishes.
    raise ImportError(
        "this folder is the source of nabla_tau.kernels: install the project (pip install -e .) and "
        "import nabla_tau.kernels instead of kernels"
    )
