"""Measurements that are no part of the package: what its speed is, and how far a paper's tables are met."""
