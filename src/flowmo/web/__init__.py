"""The networks in a browser: ``export.py`` writes them and a static page, ``server.py`` is ``flowmo demo``.

The page itself is in ``page/``: HTML, CSS and JavaScript without dependencies but onnxruntime-web.
"""
