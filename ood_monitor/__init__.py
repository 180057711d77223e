"""Tells when a deep generative model is fed, or produces, something it never learned."""

__version__ = "0.1.0"
