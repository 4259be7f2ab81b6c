"""The web page of ``flowmo demo``: its operations in ``demo.py``, its layout in ``page.py``."""
