"""Fills the reference pages from the package while mkdocs builds the site."""
