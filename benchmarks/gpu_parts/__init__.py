"""The parts of ``benchmarks/gpu.py``. A part is a generator of names and figures, each written to
the report as soon as it is known.
"""
