"""CPU kernels in C++: linear layers with IA3 vectors, and attention over strips.

They are compiled on the machine, and called from Python or from compiled forwards as operators.
"""
