"""edgeq: run, quantize, audit and adapt small language models on any CPU.

Importing the package is cheap: NumPy, Numba and the kernels load with the first use of a name below.
"""

__version__ = "0.1.0"
