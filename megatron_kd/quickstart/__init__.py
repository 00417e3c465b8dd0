"""The quickstart: the whole method on the text that every machine with Python has."""
