"""Entry point for tools that call setup.py; pyproject.toml declares everything."""

from setuptools import setup

setup()
