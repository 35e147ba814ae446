"""kun_ray: raw Chinese web text in, labelled, scored and polished instruction data out (Kun, arXiv 2401.06477)."""

__version__ = "0.1.0"
