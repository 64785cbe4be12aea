"""FastGeSSL: universal self-supervised representations. Imports nothing heavy: `fastgessl.kernels` must stay
light.
"""

__version__ = "0.1.0"
