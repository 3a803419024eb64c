"""Engines that are servers of their own, reached by HTTP and never imported."""
