"""The C++ kernels as Python calls them: a file for each folder of kernels/, and `library.py`, which compiles and loads.

Every path gives the same masks and the same survivors, so it does not matter for those which one a rank has come to.
"""
