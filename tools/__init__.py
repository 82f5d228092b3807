"""Tools for whoever works on the kernels; run from the repository, not installed with the package.

python -m tools.report    what the compiler makes of every kernel, for four chips, without a GPU
python -m tools.tune      what other tiles than those the kernels choose cost on a GPU
"""
