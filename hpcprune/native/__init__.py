"""The C++ kernels as Python calls them: a file for each folder of kernels/, and `library.py`, which compiles and loads.

Every path gives the same bits, so it does not matter for a result which one a rank has come to.
"""
