"""A pipeline in a process of its own, which gives back all memory whatever a library did.

A child imports this package before it may take memory, so that nothing is imported here.
"""
