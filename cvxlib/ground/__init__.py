"""The ground: what every other room stands on.

Validation and the one form of an error, one way to write and read tensor files, where a result came from, and the single process that
stands in for a group of them. Imports no other folder of the package.
"""
