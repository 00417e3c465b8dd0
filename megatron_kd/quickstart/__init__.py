"""The quickstart: the whole method at toy size, on text that comes with every Python."""
