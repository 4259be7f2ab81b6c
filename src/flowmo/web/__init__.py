"""The web page of ``flowmo demo``."""
