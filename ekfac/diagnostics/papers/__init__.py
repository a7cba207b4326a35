"""Measurements and theory of single publications, one part for each."""
