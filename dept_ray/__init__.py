"""dept_ray: pre-train one language model on sources that do not belong together (DEPT, arXiv 2410.05021).

Importing this package imports nothing heavy. Start reading at ``dept_ray/rounds/train.py``, the outer loop.
"""

__version__ = "0.1.0"
